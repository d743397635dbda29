"""What the headers of some images of a folder say: the side of the views that suits them, and whether one has pages."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

LARGEST = 224
_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, LARGEST)
"""Those that encoders and patches divide well."""
_LOOKED_AT = 64  # files, evenly spread over the list


def suitable(paths: Sequence[str]) -> tuple[int, str]:
    """The largest usual side that four of five images have, and a file of several pages or "" where none was met.

    Of the files alone, so that all ranks agree: the headers of some, evenly spread.  What cannot be read counts for
    nothing, and 224 stands where nothing can.
    """
    number = min(_LOOKED_AT, len(paths))
    some = [paths[place * len(paths) // number] for place in range(number)]
    headers = [_header(path) for path in some]
    paged = next((path for path, (_, pages) in zip(some, headers, strict=True) if pages > 1), "")
    shorter = [side for side, _ in headers if side]
    if not shorter:
        return LARGEST, paged
    most_have = float(np.quantile(shorter, 0.2, method="lower"))
    return max((side for side in _SIDES if side <= most_have), default=_SIDES[0]), paged


def _header(path: str) -> tuple[int, int]:
    """The shorter side of an image, and its pages or frames."""
    try:
        with Image.open(path) as image:
            return min(image.size), getattr(image, "n_frames", 1)
    except Exception:  # Pillow raises anything on damaged files, which are named when they are read
        return 0, 1
