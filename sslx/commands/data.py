"""``sslx data check [FOLDER] [flags]``."""

import sys
from collections.abc import Sequence

from sslx.config.check import load_check
from sslx.errors import ConfigError

HELP = """usage: sslx data check [FOLDER] [--source.* --data.*] [-o FILE] [--list FILE]

Look at every image of a source before a run, and say what is wrong with it.
sslx data check --help lists the options.
"""


def main(argv: Sequence[str]) -> int:
    """Look at the images of a source and return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if argv[0] != "check":
        raise ConfigError(f"sslx data has the command check, not {argv[0]}: sslx data check FOLDER")
    config = load_check(argv[1:])
    from sslx.check import report  # imports numpy and Pillow

    return report.main(config)
