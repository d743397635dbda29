"""Settle the channels of a source: how many its images have, of which type, and which values are black and white."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx.console.words import plural
from sslx.data.codecs import bands, formats
from sslx.data.codecs import levels as black_and_white
from sslx.data.codecs.formats import Levels, Range
from sslx.data.codecs.headers import Unreadable
from sslx.data.config import Config as Reading
from sslx.data.facts import Channels
from sslx.data.sources.base import Coded, Pixels, Source
from sslx.errors import ConfigError, DataError

Say = Callable[[str], None]
_MAX_DECODED = 64
_MAX_MEASURED = 256


def settled(source: Source, reading: Reading, training: Source | None, say: Say) -> Source:
    """Return the source with the channels that its images are read with.

    training: the training split, for a test split, which is read in the same way.  say: takes a line about a range
    that was measured.  Raises ConfigError for a number of channels that the images do not have, and DataError if they
    have several or if their range is unclear.
    """
    if isinstance(source, Pixels):
        return _of_pixels(source, reading, training, say)
    assert isinstance(source, Coded)
    return _of_files(source, reading, training, say)


def _with(source: Any, channels: Channels, **changes: Any) -> Any:
    return replace(source, facts=replace(source.facts, channels=channels), **changes)


def _of_pixels(source: Pixels, reading: Reading, training: Source | None, say: Say) -> Source:
    """Return pixels in memory with their range, or as gray if they are gray in three equal channels."""
    channels, wanted = source.facts.channels, reading.channels
    if wanted == 1 and channels.num == 3 and source.is_gray:
        channels = replace(channels, num=1, is_rgb=False)
        source = _with(source, channels, pixels=source.pixels[..., :1])
    if wanted not in (None, channels.num):
        raise ConfigError(
            f"{source.name} has images of {plural(channels.num, 'channel')}, not {wanted}: leave out --data.channels"
        )
    if channels.dtype == "uint8":
        return source
    if reading.range != "auto":
        low, high = reading.range
    elif training is not None and training.facts.channels.dtype == channels.dtype:
        low, high = training.facts.channels.black, training.facts.channels.full_scale
    elif channels.states_range:
        return source
    else:
        low, high = _measured_range(source, say)
    return _with(source, replace(channels, black=low, full_scale=high))


def _measured_range(source: Pixels, say: Say) -> Range:
    images = [source.pixels[i] for i in source.facts.sample(_MAX_MEASURED)]
    extremes = [(float(image.min()), float(image.max())) for image in images if np.isfinite(image).all()]
    if not extremes:
        raise DataError(f"none of {plural(len(images), 'image')} of {source.name} has finite values only: check them")
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    return black_and_white.chosen("16-bit" if source.facts.channels.dtype == "uint16" else "float", low, high, say)


def _of_files(source: Coded, reading: Reading, training: Source | None, say: Say) -> Source:
    """Return image files with the range of their values and, if that is not RGB of 8 bits, with their channels."""
    channels, levels, chosen = source.facts.channels, source.levels, reading.range
    if isinstance(training, Coded):
        channels, levels = training.facts.channels, levels or training.levels
    elif levels is None and chosen == "auto" and channels.full_scale != Channels.full_scale:
        chosen = channels.black, channels.full_scale
    if chosen != "auto":
        levels = Levels(chosen=chosen, page=reading.page)
    levels = levels or black_and_white.measure(source, say, reading.page)
    if isinstance(training, Coded) or (channels.is_plain and reading.channels is None):
        return _with(source, channels, levels=levels)
    if reading.channels not in (None, channels.num):
        channels = replace(channels, num=reading.channels, is_rgb=reading.channels == 3)
    seen = list(_looks(source, reading.page))
    _check_numbers(source, seen, channels.num, reading.max_bad)
    return _with(source, _deep(source, channels, seen, levels), levels=levels)


@dataclass(frozen=True)
class _Look:
    """What one file of a sample holds."""

    index: int
    num: int
    dtype: npt.DTypeLike
    kind: str | None
    stated: Range | None


def _looks(source: Coded, page: int) -> Iterator[_Look]:
    for index in source.facts.sample(_MAX_DECODED):
        try:
            image = formats.values(source.files(np.array([index]))[0], page)
        except Unreadable:  # reported when it is read
            continue
        num = image.array.shape[2] if image.array.ndim == 3 else 1
        yield _Look(index, num, image.array.dtype, image.kind, image.stated)


def _check_numbers(source: Coded, seen: list[_Look], wanted: int, max_bad: float) -> None:
    """Raise DataError, in one line, unless nearly all images can be read with this number of channels."""
    misfits = sum(not bands.fits(look.num, wanted) for look in seen)
    if misfits <= max_bad * len(seen):
        return
    first: dict[int, _Look] = {}
    for look in seen:
        first.setdefault(look.num, look)
    counts = {num: sum(look.num == num for look in seen) for num in first}
    kinds = "; ".join(
        f"{counts[num]} have {plural(num, 'channel')}, the first of them {source.where(first[num].index)}"
        for num in sorted(counts, key=counts.__getitem__, reverse=True)
    )
    raise DataError(
        f"expected images of {plural(wanted, 'channel')}, but of {len(seen)} images of {source.name} {kinds}: give the "
        "number that most have with --data.channels, and leave the others out with --data.exclude"
    )


def _deep(source: Coded, channels: Channels, seen: list[_Look], levels: Levels) -> Channels:
    """Return the channels with the type and range of the images that were looked at."""
    deep = [look for look in seen if look.kind is not None]
    if not deep:
        return replace(channels, dtype="uint8", black=0.0, full_scale=255.0)
    dtype = "uint16" if all(np.can_cast(look.dtype, np.uint16) for look in deep) else "float32"
    if levels.chosen:
        ranges = {levels.chosen}
    else:
        ranges = set(levels.measured.values()) or {look.stated for look in deep if look.stated is not None}
    if len(ranges) != 1:
        kinds = ", ".join(sorted({look.kind or "" for look in deep}))
        raise DataError(
            f"the images of {source.name} have values of several kinds ({kinds}): give one black and white for all of "
            "them with --data.range LOW HIGH"
        )
    ((black, white),) = ranges
    return replace(channels, dtype=dtype, black=black, full_scale=white)
