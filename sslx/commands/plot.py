"""``sslx plot CHECKPOINT [flags]``."""

from collections.abc import Sequence

from sslx import config
from sslx.machine import environment


def main(argv: Sequence[str]) -> int:
    """Write the pictures of a run to its folder and return the exit code."""
    quiet = environment.launched_rank() not in (None, 0)
    checkpoint = config.load_plot(argv, quiet=quiet).checkpoint
    from sslx.plot import pictures  # imports torch, which takes seconds

    return pictures.main(argv, checkpoint, quiet=quiet)
