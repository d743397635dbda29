"""Images for benchmarks: the one place that names the source options of sslx."""

from pathlib import Path

from harness import option

from sslx.data.sources.listing import Listing

CIFAR10 = option("--root", type=Path, required=True, help="CIFAR-10 as image files in train/CLASS and test/CLASS")
LABEL = option("--images", default="CIFAR-10 (JPEG q75)", help="name of the images, for the record")
OLD_FLAGS = {
    "--source.name": "--data.source",
    "--source.root": "--data.root",
    "--source.num-samples": "--data.num-synthetic",
}
"""The names of options in commits in which they belonged to another section."""


def flags(source: str, root: Path | None = None) -> list[str]:
    """Options of ``sslx pretrain`` that choose a source."""
    return ["--source.name", source, *(["--source.root", str(root)] if root is not None else [])]


def paths(root: Path) -> list[str]:
    """The image files in a folder, in the order of the source."""
    return sorted(Listing(root))
