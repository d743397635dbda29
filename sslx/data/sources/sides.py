"""Read the headers of a sample of images to find the suitable side of their views, and files with several pages."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

LARGEST = 224
_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, LARGEST)
"""Sides that are divisible by the strides and patch sizes of encoders."""
_NUM_HEADERS = 64  # of files evenly spaced in the list


def suitable(paths: Sequence[str]) -> tuple[int, str]:
    """Return the largest usual side that four of five images have, and a file with several pages, or "".

    The result depends only on the files, so that all ranks agree.  Unreadable files are ignored; without any readable
    file the side is 224.
    """
    number = min(_NUM_HEADERS, len(paths))
    sample = [paths[place * len(paths) // number] for place in range(number)]
    headers = [_header(path) for path in sample]
    paged = next((path for path, (_, pages) in zip(sample, headers, strict=True) if pages > 1), "")
    return usual([side for side, _ in headers if side]), paged


def usual(shorter: Sequence[int]) -> int:
    """Return the largest usual side that four of five images have, given their shorter sides; of none, 224."""
    if not shorter:
        return LARGEST
    common = float(np.quantile(shorter, 0.2, method="lower"))
    return max((side for side in _SIDES if side <= common), default=_SIDES[0])


def _header(path: str) -> tuple[int, int]:
    """Return the shorter side of an image and its number of pages or frames."""
    try:
        with Image.open(path) as image:
            return min(image.size), getattr(image, "n_frames", 1)
    except Exception:  # Pillow raises anything on damaged files, which are reported when they are read
        return 0, 1
