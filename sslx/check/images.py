"""Looks at every image of a source, in threads: what kind of file it is, how large, and what it looks like."""

import hashlib
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sslx.check import similar
from sslx.data import statistics
from sslx.data.codecs import formats, headers
from sslx.data.codecs.headers import Unreadable
from sslx.data.facts import Channels
from sslx.data.sources import Source
from sslx.data.sources.base import Coded, Pixels

Progress = Callable[[int, int | None], None]
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Looks:
    """What was seen of the N images of a source.

    unreadable: the reasons, by index.  width, height: (N,) pixels, upright, 0 if unreadable.  kind: (N,) such as "JPEG
    RGB" or "PNG 16-bit gray", "" if unreadable.  named: (N,) the kind of file that its name promises, or "".
    digest: (N, 2) of the file's bytes.  hashes: (N, 4), thumbnails: (N, 8, 8) and contrast: (N,), as
    ``similar.look``.
    mean, std: (C,) of the pixels of all images, each with the same weight, from 0 to 1.
    seconds: that reading and decoding took, added over the threads.
    """

    unreadable: dict[int, str]
    width: npt.NDArray[np.int64]
    height: npt.NDArray[np.int64]
    kind: npt.NDArray[np.str_]
    named: npt.NDArray[np.str_]
    digest: npt.NDArray[np.uint64]
    hashes: similar.Hashes
    thumbnails: similar.Thumbnails
    contrast: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    seconds: float

    @property
    def readable(self) -> npt.NDArray[np.int64]:
        """The indices of the images that can be read."""
        return np.flatnonzero(self.kind != "")


@dataclass(frozen=True, eq=False)
class _Look:
    width: int
    height: int
    kind: str
    digest: bytes
    hash: similar.Hashes
    thumbnail: similar.Thumbnails
    contrast: float
    moments: npt.NDArray[np.float64]


_ENDINGS = {
    "jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WebP", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF",
    "jp2": "JPEG 2000", "gif": "GIF", "avif": "AVIF", "heic": "HEIF", "heif": "HEIF", "dcm": "DICOM", "npy": "NPY",
}  # fmt: skip


def look(source: Source, num_threads: int, progress: Progress) -> Looks:
    """Read and decode every image of a source."""
    num, channels = len(source), source.facts.channels
    looks = Looks(
        {}, np.zeros(num, np.int64), np.zeros(num, np.int64), np.zeros(num, "U24"), np.zeros(num, "U9"),
        np.zeros((num, 2), np.uint64), np.zeros((num, similar.NUM_WORDS), np.uint64),
        np.zeros((num, similar.THUMBNAIL, similar.THUMBNAIL), np.uint8), np.zeros(num), np.zeros(channels.num),
        np.zeros(channels.num), 0.0,
    )  # fmt: skip
    moments, seconds = np.zeros((2, channels.num)), 0.0
    with ThreadPoolExecutor(num_threads, "check") as pool:
        for start in range(0, num, 16 * _CHUNK):  # bounded, so that an error or Ctrl-C ends it soon
            starts = range(start, min(start + 16 * _CHUNK, num), _CHUNK)
            for first, (found, took) in zip(starts, pool.map(partial(_chunk, source), starts), strict=True):
                seconds += took
                for index, one in enumerate(found, first):
                    looks.named[index] = _ENDINGS.get(os.path.splitext(source.path(index))[1][1:].lower(), "")
                    if isinstance(one, str):
                        looks.unreadable[index] = one
                        continue
                    looks.width[index], looks.height[index], looks.kind[index] = one.width, one.height, one.kind
                    looks.digest[index] = np.frombuffer(one.digest, np.uint64)
                    looks.hashes[index], looks.thumbnails[index] = one.hash, one.thumbnail
                    looks.contrast[index] = one.contrast
                    moments += one.moments
                progress(min(first + _CHUNK, num), num)
    looks.mean[:], looks.std[:] = statistics.mean_and_std(moments, num - len(looks.unreadable))
    return replace(looks, seconds=seconds)


def _chunk(source: Source, start: int) -> tuple[list[_Look | str], float]:
    begun = time.perf_counter()
    found: list[_Look | str] = []
    for index in range(start, min(start + _CHUNK, len(source))):
        try:
            found.append(_look(source, index))
        except Unreadable as error:
            found.append(str(error))
    return found, time.perf_counter() - begun


def _look(source: Source, index: int) -> _Look:
    channels = source.facts.channels
    if isinstance(source, Pixels):
        pixels = np.ascontiguousarray(source.read(index))
        kind, data = "pixels in memory", pixels.tobytes()
    else:
        assert isinstance(source, Coded)
        file = source.files(np.array([index]))[0]
        data = _bytes(file)
        pixels, kind = formats.read(data, source.levels, channels), _kind(data)
    hashed, thumbnail, contrast = similar.look(_as_seen(pixels, channels))
    moments = statistics.moments(pixels, channels)
    height, width = pixels.shape[:2]
    return _Look(
        width, height, kind, hashlib.blake2b(data, digest_size=16).digest(), hashed, thumbnail, contrast, moments
    )


def _as_seen(pixels: npt.NDArray[Any], channels: Channels) -> npt.NDArray[np.uint8]:
    """Return an image (H, W, C) as (H, W, 3) of 8 bits, with its first channels, to compare looks."""
    if channels.is_plain:
        return pixels
    seen = pixels[..., :3] if channels.num >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    scaled = (seen.astype(np.float32) - channels.black) * (255 / (channels.full_scale - channels.black))
    return scaled.round().clip(0, 255).astype(np.uint8)


def _bytes(file: str | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    with open(headers.opened(file), "rb") as opened:
        return opened.read()


def _kind(data: bytes) -> str:
    """Return the container of a readable file and what its pixels are, such as "PNG palette"."""

    container = headers.container(data[: headers.START_BYTES])
    if deep := formats.kind_of(data):
        return deep if deep.startswith(container) else f"{container} {deep}"
    try:
        with Image.open(io.BytesIO(data)) as image:
            names = {
                "L": "gray",
                "1": "black and white",
                "P": "palette",
                "LA": "gray and alpha",
                "RGBA": "RGB and alpha",
            }
            return f"{container} {names.get(image.mode, image.mode)}"
    except Exception:  # Pillow does not read all of the containers that sslx does
        return container
