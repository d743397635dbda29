"""``sslx bench RECIPE [flags of sslx pretrain]``."""

import sys
from collections.abc import Sequence

from sslx import config


def main(argv: Sequence[str]) -> int:
    """Measure what limits a recipe, try what may help, and print both.  Return the exit code."""
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(
            "usage: sslx bench RECIPE [OPTIONS]: takes two to three minutes, with the options of sslx pretrain:\n\n"
        )
    settings = config.load(argv)
    from sslx.bench import advice  # imports torch, which takes seconds

    return advice.main(settings)
