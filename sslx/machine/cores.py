"""How many of this machine's cores are this process's own."""

import os


def allowed() -> int:
    """Cores that this process may run on; all of the machine's where the system binds no process to some (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share(processes: int) -> int:
    """Cores for one of so many processes on this node that do the same, 1 at least.

    A job's share of a node (SLURM_CPUS_ON_NODE), divided; but no more than the process may run on, which Slurm may have
    bound to its own share already.
    """
    node = int(os.environ.get("SLURM_CPUS_ON_NODE", allowed()))
    return max(1, min(allowed(), node // processes))
