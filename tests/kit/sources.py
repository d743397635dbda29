"""Sources of a few images: pixels in memory, and files by their paths."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sslx.data.facts import Facts
from sslx.data.sources import Files, Pixels, Source
from sslx.data.sources.folder import Config as Folder


def in_memory(
    pixels: npt.NDArray[Any],
    labels: npt.NDArray[np.int64] | None = None,
    *,
    size: int = 32,
    names: tuple[str, ...] | None = None,
) -> Pixels:
    """(N, H, W, 3) uint8, named "pixels".  names: of the classes; default: 0, 1, ..."""
    classes = names if labels is None or names else tuple(str(i) for i in range(int(labels.max()) + 1))
    facts = Facts(num_samples=len(pixels), size=size, labels=labels, classes=classes)
    return Pixels(name="pixels", facts=facts, pixels=pixels)


def by_path(paths: Sequence[str | Path], labels: npt.NDArray[np.int64] | None = None, *, size: int = 32) -> Files:
    """Image files, named "files"; classes are called 0, 1, ..."""
    classes = None if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1))
    facts = Facts(num_samples=len(paths), size=size, labels=labels, classes=classes)
    return Files(name="files", facts=facts, paths=[str(path) for path in paths])


def folder(root: Path | tuple[Path, ...], **options: Any) -> Folder:
    """The config of a folder of images, or of several."""
    return Folder(root=root, **options)


def noise(folder: Path, number: int, side: int = 16) -> Path:
    """The folder, made, with so many PNG files of random pixels, side x side."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng().integers(0, 256, (number, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def paths_of(source: Source) -> list[str]:
    """The paths of a source of files."""
    assert isinstance(source, Files)
    return list(source.paths)


def pixels_of(source: Source) -> npt.NDArray[Any]:
    """The pixels of a source in memory."""
    assert isinstance(source, Pixels)
    return source.pixels


def relative(source: Source, root: Path) -> list[str]:
    """The paths of a source of files, from ``root`` on."""
    return [os.path.relpath(path, root) for path in paths_of(source)]
