"""Bring the bands of a decoded file to the number, type and range that the images of its source have."""

from typing import Any

import numpy as np
import numpy.typing as npt

from sslx.console.words import plural
from sslx.data.codecs.headers import Unreadable
from sslx.data.facts import Channels

Array = npt.NDArray[Any]
_LUMA = np.array([19595, 38470, 7471])  # ITU-R BT.601 in 2^-16, as PIL computes gray; they add up to 2^16


def fitted(array: Array, black: float, white: float, *, is_white_first: bool, channels: Channels) -> Array:
    """Return the values in a file as (H, W, C) pixels of the source's type, in which its black and white apply.

    array: (H, W) or (H, W, C) of any type.  black, white: the range of these values.  is_white_first: whether low
    values are white.  Values in the source's own range stay exactly what they are; those in another range, such as of
    an 8-bit file among 16-bit ones, are scaled.  Raises Unreadable for another number of channels.
    """
    array, dtype = _numbered(array, channels), np.dtype(channels.dtype)
    is_own = (black, white) == (channels.black, channels.full_scale) and not is_white_first
    if is_own and np.can_cast(array.dtype, dtype):
        return np.require(array, dtype, ["C", "W"])  # writable, as torch wants it
    scaled = (array.astype(np.float64) - black) / (white - black)
    if is_white_first:
        scaled = 1 - scaled
    scaled = channels.black + scaled * (channels.full_scale - channels.black)
    if dtype.kind == "f":
        return scaled.astype(dtype)
    return np.rint(scaled).clip(0, np.iinfo(dtype).max).astype(dtype)


def fits(num: int, wanted: int) -> bool:
    """Return whether images of ``num`` channels can be read as ``wanted``: gray as RGB, and RGB as gray."""
    return num == wanted or {num, wanted} == {1, 3}


def _numbered(array: Array, channels: Channels) -> Array:
    """Return the values as (H, W, C) with the source's number of channels."""
    array = array if array.ndim == 3 else array[..., None]
    num = array.shape[2]
    if num == channels.num:
        return array
    if not fits(num, channels.num):
        raise Unreadable(f"{plural(num, 'channel')}, expected {channels.num}; --data.channels gives the number")
    if num == 1:
        return np.repeat(array, 3, axis=2)
    if array.dtype.kind == "f":
        return (array @ (_LUMA / 2**16)).astype(array.dtype)[..., None]
    gray = array.astype(np.int64) @ _LUMA + 2**15 >> 16
    return gray.astype(array.dtype)[..., None]
