"""Fixtures for the data tests: pictures with edges, gradients and a little noise, and a folder of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kit.sources import by_path
from sslx.data.sources import Files

Picture = Callable[[int, int, int], npt.NDArray[np.uint8]]
SIZES = ((48, 64), (100, 70), (120, 200), (64, 64), (33, 90), (150, 110), (80, 80), (130, 51))  # height, width


def _picture(seed: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (smooth.astype(np.int64) + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def picture() -> Picture:
    """``picture(seed, height, width)`` -> (height, width, 3) uint8."""
    return _picture


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 JPEG and PNG files of eight shapes, in two class folders.  Not to be written to: copy it."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(26):
        path = root / ("cats", "dogs")[i % 2] / f"{i:02}{('.jpg', '.png')[i % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(_picture(i, *SIZES[i % len(SIZES)])).save(path, quality=92)
    return root


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> Files:
    """26 files of their own, each with its own label, so that a label tells which one was read."""
    shutil.copytree(folder, tmp_path / "images")
    return by_path(sorted((tmp_path / "images").rglob("*.*")), np.arange(26))
