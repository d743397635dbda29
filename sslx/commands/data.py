"""``sslx data check [FOLDER] [flags]`` and ``sslx data stats [FOLDER] [flags]``."""

import sys
from collections.abc import Sequence

from sslx.config.check import load_check, load_stats
from sslx.errors import ConfigError

HELP = """usage: sslx data check [FOLDER] [--source.* --data.*] [-o FILE] [--list FILE]
       sslx data stats [FOLDER] [--source.* --data.*] [-o FILE]

check looks at every image of a source before a run, and says what is wrong
with it.  stats measures sizes, channels, depth, means and standard deviations,
and gives the flags that normalize by them.
sslx data check --help and sslx data stats --help list the options.
"""


def main(argv: Sequence[str]) -> int:
    """Look at the images of a source and return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if argv[0] not in ("check", "stats"):
        raise ConfigError(f"sslx data has the commands check and stats, not {argv[0]}: sslx data check FOLDER")
    if argv[0] == "stats":
        settings = load_stats(argv[1:])
        from sslx.check import stats  # imports numpy and Pillow

        return stats.main(settings)
    config = load_check(argv[1:])
    from sslx.check import report  # imports numpy and Pillow

    return report.main(config)
