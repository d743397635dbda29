"""``sslx pretrain [RECIPE ...] [flags]``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sslx import config
from sslx.machine import environment

if TYPE_CHECKING:
    from sslx.train.signals import StopSignals


def main(argv: Sequence[str], stop: "StopSignals | None" = None) -> int:
    """Join the ranks that torchrun or Slurm started, or start them; returns the exit code.

    stop: entered already, by a job that listened before it imported all this.
    """
    environment.check()
    settings = config.load(argv, quiet=environment.joined() not in (None, 0))
    from sslx.train import launch  # it takes torch, and so seconds

    return launch.main(settings, argv, stop)
