"""HEIF, such as HEIC of phones: the primary image of a file, with its 8, 10 or 12 bits, by pillow-heif.

The file's own rotation is applied by the library, and EXIF's orientation is not, as the standard demands.
"""

from typing import Any, BinaryIO

import numpy as np

from sslx.data.codecs.headers import Unreadable, check_size
from sslx.data.codecs.values import Values, library


def values(file: BinaryIO) -> Values:
    """Return the values of the primary image.  10 and 12 bits are stated, so that they need no ``Levels``."""
    image = _primary(file)
    mode, _, depth = str(image.mode).partition(";")
    if "a" in mode:
        raise Unreadable("a HEIF whose colors are multiplied by their alpha, which sslx does not read")
    array = np.array(image)
    if mode in ("LA", "RGBA"):
        array = array[..., 0] if mode == "LA" else array[..., :3]
    if not depth:
        return Values(np.ascontiguousarray(array))
    return Values(np.ascontiguousarray(array), f"{depth}-bit", (0.0, 2.0 ** int(depth) - 1))


def size(file: BinaryIO) -> tuple[int, int, int]:
    """Return height, width and 1, from the header alone."""
    width, height = _primary(file).size
    return height, width, 1


def _primary(file: BinaryIO) -> Any:
    """Return the primary image, not yet decoded.  Raises Unreadable for too many pixels."""
    pillow_heif = library("pillow_heif", "a HEIF", "pillow-heif")
    file.seek(0)
    opened = pillow_heif.open_heif(file, convert_hdr_to_8bit=False, hdr_to_16bit=False)
    image = opened[opened.primary_index]
    width, height = image.size
    check_size(width, height, 2 * 4)
    return image
