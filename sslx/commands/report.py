"""``sslx report RUN [RUN ...] [flags]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslx.config import parser
from sslx.config.parser import Positional, arg


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write one page about runs that works offline.

    It has curves, scores, pictures, settings, hardware and cost.

    What is missing of these is measured and drawn first.
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders.  Their curves are drawn over one another."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """The file to write.  Default: report.html in the first run's folder."""
    scores: bool = True
    """Measure the scores of ``sslx probe`` first, where they are missing or older than the newest checkpoint."""
    pictures: bool = True
    """Draw the pictures of ``sslx plot`` first, where they are missing or older than the newest checkpoint."""


def main(argv: Sequence[str]) -> int:
    """Write the page, say where it is, and return the exit code."""
    config = parser.parse(Config, argv, "sslx report")
    from sslx.report import writer  # imports numpy and matplotlib

    return writer.main(config.runs, config.output, measure=config.scores, draw=config.pictures)
