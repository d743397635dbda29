"""Near copies of images, by small hashes and thumbnails of their looks."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

NUM_WORDS, THUMBNAIL = 4, 8
"""A hash has 4 words of 64 bits.  A thumbnail has 8 x 8 gray pixels."""
MAX_DISTANCE, MAX_DIFFERENCE = 10, 4.0
"""Near copies have hashes that differ in at most 10 of 256 bits, and thumbnails that differ by at most 4 of 255.

An image that was saved again as a JPEG or resized differs from itself by 3 bits and 1 of 255, as a rule.
"""
_NUM_BITS = np.array([byte.bit_count() for byte in range(256)])  # numpy 1 has no bitwise_count
_MAX_GROUP = 2_000
"""Larger groups of images with a part of the hash in common are of featureless images and not compared."""
Hashes = npt.NDArray[np.uint64]
Thumbnails = npt.NDArray[np.uint8]


def look(pixels: npt.NDArray[np.uint8]) -> tuple[Hashes, Thumbnails, float]:
    """Return the (4,) difference hash of an image (H, W, 3), its (8, 8) thumbnail, and its contrast.

    The hash says for 16 x 16 places whether the image gets brighter to the right (Krawetz's dHash, with more bits).
    The contrast is the standard deviation of gray, from 0 to 127.
    """
    gray = Image.fromarray(pixels).convert("L")
    values = np.asarray(gray.resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    thumbnail = np.asarray(gray.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return np.packbits(values[:, 1:] > values[:, :-1]).view(np.uint64), thumbnail, float(values.std())


def groups(hashes: Hashes, thumbnails: Thumbnails) -> list[list[int]]:
    """Return groups of two or more of N images that are near copies, directly or through others.

    hashes: (N, 4).  thumbnails: (N, 8, 8).
    """
    parent = list(range(len(hashes)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in _near_pairs(hashes, thumbnails.reshape(len(hashes), -1).astype(np.int16)):
        parent[root(b)] = root(a)
    found = dict[int, list[int]]()
    for row in range(len(hashes)):
        found.setdefault(root(row), []).append(row)
    return [rows for rows in found.values() if len(rows) > 1]


def _near_pairs(hashes: Hashes, thumbnails: npt.NDArray[np.int16]) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows that are near each other; a pair may come several times.

    Hashes that differ in at most 10 bits are equal in one of their 16 parts of 16 bits, as in any pigeonhole, so only
    rows with an equal part are compared.
    """
    parts = np.ascontiguousarray(hashes).view(np.uint16)  # (N, 16)
    for part in parts.T:
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order].astype(np.int64), prepend=-1, append=-1))
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            if not 1 < stop - start <= _MAX_GROUP:
                continue
            rows = order[start:stop]
            for place, row in enumerate(rows[:-1].tolist()):
                others = rows[place + 1 :]
                distance = _NUM_BITS[(hashes[others] ^ hashes[row]).view(np.uint8)].sum(axis=1)
                others = others[distance <= MAX_DISTANCE]
                difference = np.square(thumbnails[others] - thumbnails[row], dtype=np.float32).mean(axis=1)
                for other in others[difference <= MAX_DIFFERENCE**2].tolist():
                    yield row, other
