"""NPY files of one image each: (H, W), (H, W, C) or (C, H, W) of uint8, uint16, other integers, floats or bool."""

import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from sslx.data.codecs.headers import Unreadable, check_size
from sslx.data.codecs.values import Values, finite

_KINDS = {"u": "{}-bit", "i": "signed {}-bit", "f": "float"}
_MAX_BANDS = 1024


@dataclass(frozen=True)
class _Header:
    """height, width, bands: of the image.  bands_first: whether the file holds (C, H, W)."""

    height: int
    width: int
    bands: int
    bands_first: bool
    dtype: "np.dtype[Any]"

    @property
    def kind(self) -> str | None:
        """The kind of values whose range is unknown, or None for uint8 and bool."""
        if self.dtype.name in ("uint8", "bool"):
            return None
        return _KINDS[self.dtype.kind].format(8 * self.dtype.itemsize)


def values(file: BinaryIO) -> Values:
    """Return the values, with the bands last.  Of three sides, the first is that of the bands if it is the smallest."""
    header = _header(file)
    file.seek(0)
    array = np.asarray(np.load(file, allow_pickle=False))
    if header.dtype == np.bool_:
        array = array * np.uint8(255)
    if header.bands_first:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and header.bands == 1:
        array = array[..., 0]
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return Values(finite(native), header.kind)


def kind(file: BinaryIO) -> str | None:
    """Return, from the header alone, the kind of values whose range is unknown, or None for uint8 and bool."""
    return _header(file).kind


def size(file: BinaryIO) -> tuple[int, int, int]:
    """Return height, width and 1, from the header alone."""
    header = _header(file)
    return header.height, header.width, 1


def _header(file: BinaryIO) -> _Header:
    """Read the header.  Raises Unreadable for an array that is no image, for too many pixels, and for a cut file."""
    file.seek(0)
    version = npy_format.read_magic(file)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, _, dtype = read(file)
    what = f"an NPY array of the shape {shape} and type {dtype}"
    bands_first = len(shape) == 3 and shape[0] < min(shape[1:])
    if len(shape) == 4 or (len(shape) == 3 and shape[0 if bands_first else 2] > _MAX_BANDS):
        raise Unreadable(f"{what}: --source.name arrays reads files of several images")
    if len(shape) not in (2, 3) or not all(shape) or dtype.kind not in "buif":
        raise Unreadable(f"{what}: expected (H, W), (H, W, C) or (C, H, W) of numbers")
    bands, height, width = shape if bands_first else ((*shape, 1)[2], *shape[:2])
    check_size(width, height, bands * dtype.itemsize)
    if os.fstat(file.fileno()).st_size - file.tell() < math.prod(shape) * dtype.itemsize:
        raise Unreadable(f"{what} that is cut")
    return _Header(height, width, bands, bands_first, dtype)
