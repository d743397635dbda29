"""``sslx neighbors CHECKPOINT IMAGE... [flags]``."""

from collections.abc import Sequence

from sslx import config
from sslx.machine import environment


def main(argv: Sequence[str]) -> int:
    """Print and draw the images nearest to given ones and return the exit code."""
    quiet = environment.launched_rank() not in (None, 0)
    options = config.load_neighbors(argv, quiet=quiet)
    from sslx.embed import neighbors  # imports torch, which takes seconds

    return neighbors.main(argv, options.checkpoint, options.part, quiet=quiet)
