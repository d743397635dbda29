"""The mean and standard deviation of each channel of a source's images, by which views are normalized."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx.console import activity
from sslx.console.words import plural
from sslx.data import exclusion, views
from sslx.data.codecs import formats, levels
from sslx.data.codecs.headers import Unreadable
from sslx.data.config import Config as Reading
from sslx.data.facts import Channels
from sslx.data.sources.base import Coded, Context, Pixels, Source
from sslx.data.views import ViewSpec
from sslx.errors import ConfigError, DataError

NUM_IMAGES = 256
"""Number of images, evenly spaced, on which the defaults are measured."""
_DIGITS = 4
_CONSTANT = 1e-6  # standard deviation below which a channel is the same everywhere


@dataclass(frozen=True)
class Normalization:
    """The mean and standard deviation of each channel, of values from 0 (black) to 1 (white), and a line about them.

    line: how they were found, or "" if the user or ImageNet gave them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    line: str = ""


def pixels(source: Source, index: int) -> npt.NDArray[Any]:
    """Return an image (H, W, C) of the number and type of the source's channels.  Raises Unreadable."""
    if isinstance(source, Pixels):
        return source.read(index)
    assert isinstance(source, Coded)
    return formats.read(source.files(np.array([index]))[0], levels.of(source), source.facts.channels)


def moments(image: npt.NDArray[Any], channels: Channels) -> npt.NDArray[np.float64]:
    """Return the means of an image's values, and of their squares, from 0 (black) to 1 (white): (2, C)."""
    scaled = image.reshape(-1, image.shape[-1]).astype(np.float32 if image.dtype == np.uint8 else np.float64)
    if image.dtype == np.uint8:
        scaled /= 255
    else:
        scaled = ((scaled - channels.black) / (channels.full_scale - channels.black)).clip(0, 1)
    return np.stack([scaled.mean(0, dtype=np.float64), np.square(scaled).mean(0, dtype=np.float64)])


def mean_and_std(sums: npt.NDArray[np.float64], num: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mean and standard deviation of each channel (C,) from the sum (2, C) of the ``moments`` of images.

    Each image has the same weight, whatever its size.
    """
    mean, square = sums / max(1, num)
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def rounded(mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]) -> Normalization:
    """Return both as numbers of four digits, which flags can give.

    The standard deviation of a channel that is the same everywhere is 1, so that it becomes 0.
    """
    std = np.where(std < _CONSTANT, 1, std)
    short_mean, short_std = (tuple(float(f"{x:.{_DIGITS}g}") for x in values.tolist()) for values in (mean, std))
    return Normalization(short_mean, short_std)


def flags(found: Normalization) -> str:
    """Return the flags that give these numbers."""
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (found.mean, found.std))
    return f"--data.mean {mean} --data.std {std}"


def normalization(source: Source, reading: Reading) -> Normalization:
    """Return the mean and standard deviation that views of a run's images are normalized by.

    They are the user's, ImageNet's for RGB, or measured on 256 of the images, which depends on the files alone, so that
    all ranks and a resumed run agree.  Raises ConfigError for a wrong number of values, DataError if none of these
    images can be read, and StorageError for a disk that does not answer.
    """
    channels = source.facts.channels
    if reading.mean:
        if len(reading.mean) != channels.num:
            raise ConfigError(
                f"{source.name} has {plural(channels.num, 'channel')}, and --data.mean and --data.std give "
                f"{len(reading.mean)} numbers: give one for each channel"
            )
        return Normalization(reading.mean, reading.std)
    if channels.is_rgb:
        return Normalization(views.IMAGENET_MEAN, views.IMAGENET_STD)
    excluded = exclusion.excluded(reading.exclude, source)[0].tolist() if reading.exclude else []
    with activity.doing("measuring the mean of the images"):
        call = Context(timeout_s=reading.timeout_s).call
        return call(f"the mean of the images of {source.name}", lambda _: _measured(source, set(excluded)))


def evaluation_view(reading: Reading, source: Source, say: Callable[[str], None]) -> ViewSpec:
    """Return the view that probes see of a run's images.  say: takes a line about numbers that were measured."""
    found = normalization(source, reading)
    if found.line:
        say(found.line)
    size = reading.eval_size or reading.size or source.facts.size
    return views.eval_view(size, found.mean, found.std, source.facts.channels)


def _measured(source: Source, excluded: set[int]) -> Normalization:
    found = list(_of_sample(source, excluded))
    if not found:
        raise DataError(
            f"none of the images of {source.name} that were looked at can be read: sslx data check says why"
        )
    result = rounded(*mean_and_std(np.sum(found, axis=0), len(found)))
    line = f"normalized by the mean and standard deviation of {plural(len(found), 'image')} ({flags(result)})"
    return Normalization(result.mean, result.std, line)


def _of_sample(source: Source, excluded: set[int]) -> Iterator[npt.NDArray[np.float64]]:
    for index in source.facts.sample(NUM_IMAGES):
        if index in excluded:
            continue
        try:
            yield moments(pixels(source, index), source.facts.channels)
        except Unreadable:  # reported when it is read
            continue
