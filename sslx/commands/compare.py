"""``sslx compare RUN RUN... [flags]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sslx.config import parser
from sslx.config.parser import Positional


@dataclass(frozen=True, kw_only=True)
class Config:
    """Rank runs by the scores of ``sslx probe`` that need no labels.

    Where there are accuracies, Spearman's rho shows how well each ranking agrees.
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders, all probed on the same images."""
    json: Path | None = None
    """File to write the comparison to, as JSON."""


def main(argv: Sequence[str]) -> int:
    """Print the tables and return the exit code."""
    config = parser.parse(Config, argv, "sslx compare")
    from sslx.probe import compare  # imports scipy, which takes a second

    return compare.main(config.runs, config.json)
