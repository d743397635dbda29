"""``sslx weights FILE``: show what a file of weights holds, and which encoder fits it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sslx.config import parser
from sslx.config.parser import Positional


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show what a file of weights holds, and the flags to start from it."""

    file: Positional[Path]
    """A .pt, .pth or .safetensors file, the .index.json of a sharded one, a folder of save_pretrained, or a run."""


def main(argv: Sequence[str]) -> int:
    """Print what a file holds and return the exit code."""
    config = parser.parse(Config, argv, "sslx weights")
    from sslx.encoders.weights import describe  # here: it imports torch, which takes seconds

    sys.stdout.write("\n".join(describe.lines(str(config.file))) + "\n")
    return 0
