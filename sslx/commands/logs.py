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
    """Show the output of a run's job."""

    run: Positional[Path]
    """The run folder."""
    lines: Annotated[int, arg(aliases=["-n"])] = 50
    """Number of last lines to show."""
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Keep printing as the job prints more, until Ctrl-C."""


def main(argv: Sequence[str]) -> int:
    """Print the log and return the exit code."""
    config = parser.parse(Config, argv, "sslx logs")
    return jobs.show_log(config.run, config.lines, config.follow)
