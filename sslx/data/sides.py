"""The side of the training views that suits a folder of images: 224 px only for images that have as many."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

LARGEST = 224
_SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, LARGEST)
"""Those that encoders and patches divide well."""
_LOOKED_AT = 64  # files, evenly spread over the list


def suitable(paths: Sequence[str]) -> int:
    """The largest usual side that four of five images have; of the files alone, so that all ranks agree.

    Only headers are read.  What cannot be read counts for nothing, and 224 stands where nothing can.
    """
    number = min(_LOOKED_AT, len(paths))
    shorter = [side for place in range(number) if (side := _shorter_side(paths[place * len(paths) // number]))]
    if not shorter:
        return LARGEST
    most_have = float(np.quantile(shorter, 0.2, method="lower"))
    return max((side for side in _SIDES if side <= most_have), default=_SIDES[0])


def _shorter_side(path: str) -> int:
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # Pillow raises anything on damaged files, which are named when they are read
        return 0
