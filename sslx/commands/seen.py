"""``sslx seen RUN IMAGE``: show when and how an image took part in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslx.config import parser
from sslx.config.parser import Positional, arg


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show each step, epoch, view and crop in which an image took part in training.

    They follow from the run's seed, so that any run can be asked.
    """

    run: Positional[Path]
    """A run folder, or a checkpoint directory in it."""
    image: Positional[str]
    """The path of an image of the run's source, or its index there."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """A JSON file to write, with the parameters of each view."""


def main(argv: Sequence[str]) -> int:
    """Print when and how an image took part in training, and return the exit code."""
    config = parser.parse(Config, argv, "sslx seen")
    from sslx.train import seen  # imports torch, which takes seconds

    return seen.main(config.run, config.image, config.output)
