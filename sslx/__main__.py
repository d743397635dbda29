"""The ``sslx`` command as a process: ``sslx``, ``python -m sslx`` and the scripts in launch/."""

import sys
from collections.abc import Sequence

from sslx.machine import interrupts


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand, heeding signals from the first line to the last; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    interrupts.begin(saves=arguments[:1] in (["pretrain"], ["resume"]))
    from sslx import cli

    code = cli.main(arguments)
    interrupts.ignore_signals()
    return code


if __name__ == "__main__":
    sys.exit(main())
