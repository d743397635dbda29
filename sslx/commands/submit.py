"""``sslx submit [flags] -- RECIPE [flags of sslx pretrain]``."""

from collections.abc import Sequence

from sslx.cluster.allocation import load_submit


def main(argv: Sequence[str]) -> int:
    """Submit the job and print where its files are; returns the exit code as soon as the job is queued."""
    request, arguments = load_submit(argv)
    from sslx.cluster import submit  # it takes submitit, and so a second

    return submit.main(request, arguments)
