"""``sslx probe CHECKPOINT... [flags]``."""

from collections.abc import Sequence

from sslx import config
from sslx.machine import environment


def main(argv: Sequence[str]) -> int:
    """Print the tables of scores and write them to ``probe.json`` in each run folder.  Return the exit code."""
    quiet = environment.launched_rank() not in (None, 0)
    options = config.load_probe(argv, quiet=quiet)
    from sslx.probe import scores  # imports torch, which takes seconds

    return scores.main(argv, options.checkpoints, options.part, quiet=quiet)
