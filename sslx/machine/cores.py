"""Number of CPU cores that this process may use."""

import os


def allowed() -> int:
    """Return the number of cores that this process may run on, or of all cores where affinity is unknown (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def per_process(num_processes: int) -> int:
    """Return the number of cores (at least 1) for each of ``num_processes`` equal processes on this node.

    It is the job's share of the node (SLURM_CPUS_ON_NODE), divided by the number of processes, but at most the cores
    that this process may run on, because Slurm may already have bound it to its own share.
    """
    node = int(os.environ.get("SLURM_CPUS_ON_NODE", allowed()))
    return max(1, min(allowed(), node // num_processes))
