"""A folder of image files by their names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """``make("a/1.png", ...)`` -> a folder, the same one at each call, that holds these files: small PNG images all."""

    def files(*names: str) -> Path:
        for name in names:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((12, 10, 3), len(name), dtype=np.uint8)).save(path, format="PNG")
        return tmp_path / "images"

    return files
