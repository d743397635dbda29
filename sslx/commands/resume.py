"""``sslx resume RUN [flags]``: ``sslx pretrain`` with the config of an existing run."""

import sys
from collections.abc import Sequence

from sslx.commands import pretrain
from sslx.errors import ConfigError

HELP = """usage: sslx resume RUN [--option VALUE ...]

Continue the run in the folder RUN from its newest good checkpoint, with the
options that it was started with.  Flags may change where and how it runs
(--ranks, --data.threads, --log.every, ...), but not what it computes.
"""


def main(argv: Sequence[str]) -> int:
    """Continue training and return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        if argv:
            sys.stdout.write(HELP)
            return 0
        raise ConfigError("sslx resume needs the folder of a run, as in: sslx resume runs/simclr_digits")
    return pretrain.main(["--resume", *argv])
