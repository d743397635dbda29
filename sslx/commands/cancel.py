"""``sslx cancel RUN [flags]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sslx.cluster import jobs
from sslx.config import parser
from sslx.config.parser import Positional


@dataclass(frozen=True, kw_only=True)
class Config:
    """Save a checkpoint of a run and end its job."""

    run: Positional[Path]
    """The run folder."""
    wait_s: float = 120.0
    """Seconds to wait for the checkpoint."""


def main(argv: Sequence[str]) -> int:
    """End the job and return the exit code."""
    config = parser.parse(Config, argv, "sslx cancel")
    return jobs.cancel(config.run, config.wait_s)
