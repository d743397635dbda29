"""``sslx pretrain [RECIPE ...] [flags]``."""

import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sslx import config
from sslx.machine import environment

if TYPE_CHECKING:
    from sslx.train.signals import StopSignals


def main(argv: Sequence[str], stop: "StopSignals | None" = None) -> int:
    """Join the ranks that torchrun or Slurm started, or start them.  Return the exit code.

    stop: already entered, by a job that handles signals before it imports everything.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        return _help([argument for argument in argv if argument not in ("-h", "--help")])
    environment.check()
    settings = config.load(argv, quiet=environment.launched_rank() not in (None, 0))
    from sslx.train import launch  # imports torch, which takes seconds

    return launch.main(settings, argv, stop)


def _help(argv: Sequence[str]) -> int:
    """Print the most used options, with the values of the recipes and flags in ``argv``."""
    from sslx.config import short_help

    settings = config.parse(argv)
    recipes = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    sys.stdout.write(short_help.text(settings, recipes, config.num_options(settings)))
    return 0
