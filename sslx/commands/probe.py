"""``sslx probe CHECKPOINT [flags]``."""

from collections.abc import Sequence

from sslx import config
from sslx.machine import environment


def main(argv: Sequence[str]) -> int:
    """Print the table of scores and write it to ``probe.json`` in the run folder.  Return the exit code."""
    quiet = environment.launched_rank() not in (None, 0)
    checkpoint = config.load_probe(argv, quiet=quiet).checkpoint
    from sslx.probe import scores  # imports torch, which takes seconds

    return scores.main(argv, checkpoint, quiet=quiet)
