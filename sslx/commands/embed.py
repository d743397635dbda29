"""``sslx embed CHECKPOINT -o FILE [flags]``."""

from collections.abc import Sequence

from sslx import config
from sslx.machine import environment


def main(argv: Sequence[str]) -> int:
    """Write the features of images to a file and return the exit code."""
    quiet = environment.launched_rank() not in (None, 0)
    options = config.load_embed(argv, quiet=quiet)
    from sslx.embed import run  # imports torch, which takes seconds

    return run.main(argv, options.checkpoint, options.part, quiet=quiet)
