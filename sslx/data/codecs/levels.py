"""Black and white of images whose files do not state them: chosen by the user, or measured on a sample and reported.

A 16-bit file may hold 10, 12 or 16 bits, and floats any values.  All ranks, all backends and a resumed run must agree,
so the measurement depends on the files alone.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sslx.data.codecs import formats
from sslx.data.codecs.formats import Levels, Range
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.facts import Facts

_MAX_FILES = 256  # evenly spaced
_MAX_FILES_PER_KIND = 32


class Coded(Protocol):
    """A source of image files."""

    @property
    def levels(self) -> Levels | None: ...
    @property
    def facts(self) -> Facts: ...
    def files(self, index: npt.NDArray[np.int64]) -> Sequence[File]: ...


def of(source: Coded) -> Levels:
    """Return the source's levels.  If it has none, they are measured on its images once."""
    return source.levels or _measured(source)


@lru_cache(maxsize=2)
def _measured(source: Coded) -> Levels:
    return measure(source)


def measure(source: Coded, say: Callable[[str], None] = lambda _: None, page: int = 0) -> Levels:
    """Measure black and white of these images, and report ranges other than the data type's whole range.

    page: of a TIFF, or frame of a DICOM file, which is measured and read.
    """
    extremes: dict[str, tuple[float, float, int]] = {}
    for index in source.facts.sample(_MAX_FILES):
        try:
            (file,) = source.files(np.array([index]))
            kind = formats.kind_of(file, page)
            if kind is None or extremes.get(kind, (0, 0, 0))[2] == _MAX_FILES_PER_KIND:
                continue
            image = formats.values(file, page)
        except Unreadable:
            continue
        if image.stated is not None:
            continue
        low, high, count = extremes.get(kind, (np.inf, -np.inf, 0))
        extremes[kind] = min(low, float(image.array.min())), max(high, float(image.array.max())), count + 1
    ranges = {kind: chosen(kind, low, high, say) for kind, (low, high, _) in extremes.items()}
    return Levels(measured=ranges, page=page)


def chosen(kind: str, low: float, high: float, say: Callable[[str], None]) -> Range:
    """Return black and white of images with values from low to high, and report all but the data type's whole range."""
    black, white = _range(kind, low, high)
    if (kind, white) != ("16-bit", 65535):
        say(
            f"{kind} images use {low:g} to {high:g}: {black:g} is taken as black, {white:g} as white "
            "(--data.range LOW HIGH for others)"
        )
    return black, white


def _range(kind: str, low: float, high: float) -> Range:
    """Return black and white of values from low to high: a usual range that they fill by more than half, or theirs."""
    usual = (1, 255, 65535) if kind == "float" else tuple(2**bits - 1 for bits in range(8, 33))
    for white in usual:
        is_narrow = white == 255 and kind.endswith("-bit")  # few gray levels of a kind of file that has more
        if 0 <= low and high <= white and (high > white / 2 or is_narrow):
            return 0.0, float(white)
    return (low, high) if high > low else (low, low + 1)
