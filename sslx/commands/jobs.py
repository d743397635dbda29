"""``sslx jobs [FOLDER]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sslx.cluster import jobs
from sslx.config import parser
from sslx.config.parser import Positional


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show the state of every run in a folder."""

    folder: Positional[Path] = Path("runs")
    """A run folder, or a folder of runs."""


def main(argv: Sequence[str]) -> int:
    """Print the table of runs and return the exit code."""
    return jobs.show(parser.parse(Config, argv, "sslx jobs").folder)
