"""The values in an image's file before they become pixels, and the libraries that read the rarer formats."""

import logging
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx.data.codecs.headers import Unreadable

Range = tuple[float, float]
_LARGEST = 1e38  # of a float, whose differences have 32 bits


@dataclass(frozen=True)
class Values:
    """The values in an image's file: (H, W), or (H, W, C) for any number of bands C, upright, of the file's own type.

    Alpha channels that the file names as such are left out.
    kind: the kind of values with an unknown range, such as ``16-bit``, or None for uint8 from black, 0, to white, 255.
    stated: the range that the format implies.  white_first: whether low values are white.
    alpha_unstated: whether the last of the bands may be an alpha channel, because the file does not say what it is.
    """

    array: npt.NDArray[Any]
    kind: str | None = None
    stated: Range | None = None
    white_first: bool = False
    alpha_unstated: bool = False


def library(name: str, what: str, package: str) -> Any:
    """Import and return a library that not every user needs.

    what: the image that it reads.  package: its name for pip.  Raises Unreadable with the command to install it.
    """
    try:
        module = import_module(name)
    except ImportError as error:
        raise Unreadable(f"{what}, which sslx reads with another package: pip install {package}") from error
    logging.getLogger(name.partition(".")[0]).setLevel(logging.CRITICAL)  # what is wrong with a file is in the error
    return module


def turned(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return an image, (H, W) or (H, W, C), upright.  orientation: as EXIF numbers them; others than 2 to 8 are 1."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def finite(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array.  Raises Unreadable if it has values that are not finite, or too large to be scaled."""
    if array.dtype.kind == "f" and not (array.min() >= -_LARGEST and array.max() <= _LARGEST):
        raise Unreadable(f"some of its values are not finite numbers up to {_LARGEST:g}")
    return array


for _module in ("PIL", "pydicom", "tifffile"):  # about damaged files, which are refused or read as other programs do
    warnings.filterwarnings("ignore", module=rf"{_module}\.")
