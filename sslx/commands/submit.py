"""``sslx submit [flags] -- RECIPE [flags of sslx pretrain]``."""

from collections.abc import Sequence

from sslx.cluster.allocation import load_submit


def main(argv: Sequence[str]) -> int:
    """Submit the job, print where its files are, and return the exit code without waiting for the job."""
    allocation, arguments = load_submit(argv)
    from sslx.cluster import submit  # imports submitit, which takes a second

    return submit.main(allocation, arguments)
