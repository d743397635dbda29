"""``sslx export CHECKPOINT [flags]``."""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sslx.config import parser
from sslx.config.parser import Positional, arg


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write an encoder for another library, which then has to load it."""

    checkpoint: Positional[Path]
    """A run folder, a checkpoint directory in it, or weights of another library."""
    to: str = "timm"
    """timm, torchvision, hf (Hugging Face's transformers), safetensors, onnx, or the path of your own .py file."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """The folder to write.  Default: RUN/export/TARGET."""
    part: str | None = None
    """Place of the encoder in a file of another library that holds several, such as teacher."""


def main(argv: Sequence[str]) -> int:
    """Write an encoder, print how to load it, and return the exit code."""
    config = parser.parse(Config, argv, "sslx export")
    import sslx  # here and below: these import torch, which takes seconds
    from sslx.console.words import shown
    from sslx.export import exporter

    exporter.TARGETS.path(config.to)  # raises an error before the checkpoint is read
    trained = sslx.load(config.checkpoint, part=config.part)
    sys.stdout.write("".join(f"{line}\n" for line in trained.notes))
    folder = config.output or exporter.default_folder(trained, config.to)
    difference = exporter.export(trained, config.to, folder)
    sys.stdout.write(
        f"wrote {shown(folder)}: features equal to the encoder's within {difference:.0e}\n"
        f"load it:\n{textwrap.indent(exporter.usage(trained, config.to, folder), '  ')}\n"
    )
    return 0
