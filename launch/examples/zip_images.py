"""Images in a zip file, with its folders as classes."""

import os
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sslx.data.facts import Facts
from sslx.data.order import Indices
from sslx.data.sources import Context, Encoded, SourceConfig, Split
from sslx.errors import ConfigError, MissingInput


@cache
def opened(path: Path, process: int) -> zipfile.ZipFile:
    """The archive, opened once in each process: worker processes must not share a file's position."""
    assert process == os.getpid()
    return zipfile.ZipFile(path)


@dataclass(frozen=True)
class Members:
    """Reads the image files of the archive, by their numbers."""

    path: Path
    names: tuple[str, ...]

    def read(self, rows: Indices) -> list[bytes]:
        return [opened(self.path, os.getpid()).read(self.names[row]) for row in rows]

    def where(self, row: int) -> str:
        return f"{self.path}!{self.names[row]}"


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """Where the archive is."""

    archive: Path | None = None
    """Zip file of images."""

    def build(self, split: Split, context: Context) -> Encoded:
        if self.archive is None:
            raise ConfigError("give the zip file with --source.archive FILE")
        if split == "test":
            raise MissingInput("the archive has no test images")
        names = [name for name in opened(self.archive, os.getpid()).namelist() if not name.endswith("/")]
        names.sort(key=lambda name: name.rpartition("/"))  # one folder after another
        folders = [name.rpartition("/")[0] for name in names]
        classes, blocks, labels = np.unique(folders, return_index=True, return_inverse=True)
        facts = Facts(num_samples=len(names), size=32, labels=labels, classes=tuple(classes.tolist()), blocks=blocks)
        return Encoded(name=str(self.archive), facts=facts, reader=Members(self.archive, tuple(names)))
