"""Images for benchmarks: the one place that names the source options of sslx."""

from pathlib import Path
from typing import Any

from harness import option

from sslx import data
from sslx.data import sources

CIFAR10 = option("--root", type=Path, required=True, help="CIFAR-10 as image files in train/CLASS and test/CLASS")
LABEL = option("--images", default="CIFAR-10 (JPEG q75)", help="name of the images, for the record")
OLD_FLAGS = {"--source.name": "--data.source", "--source.root": "--data.root"}
"""Names of options in commits before 0.3."""


def flags(source: str, root: Path | None = None) -> list[str]:
    """Options of ``sslx pretrain`` that choose a source."""
    return ["--data.source", source, *(["--data.root", str(root)] if root is not None else [])]


def folder(root: Path, **settings: Any) -> data.Config:
    """The config of the images in a folder."""
    return data.Config(source="folder", root=root, **settings)


def paths(root: Path) -> list[str]:
    """The image files in a folder, in the order of the source."""
    return list(sources.build(folder(root), "pretrain").paths or ())
