"""``sslx logs RUN [flags]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslx.cluster import jobs
from sslx.config import parser
from sslx.config.parser import Positional, arg


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show what the job of a run has printed."""

    run: Positional[Path]
    """A run folder."""
    lines: Annotated[int, arg(aliases=["-n"])] = 50
    """Lines to show first."""
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Go on as the job prints more, until Ctrl-C."""


def main(argv: Sequence[str]) -> int:
    """Print the log; returns the exit code."""
    config = parser.parse(Config, argv, "sslx logs")
    return jobs.show_log(config.run, config.lines, config.follow)
