"""A part of the training images that stands in for a test split where there is none, always the same one."""

import numpy as np
import numpy.typing as npt

from sslx import rng

SHARE = 5
"""One of so many images is held out,"""
MOST = 2_000
"""but at most so many."""
ENOUGH = 50
"""Fewer show little: where no probe trains on the others, so many are taken, or all that there are."""
_SEED = 0

Rows = npt.NDArray[np.int64]


def number(size: int, least: int = 1) -> int:
    """How many of ``size`` images are held out: a fifth, at least ``least`` where there are so many, at most 2,000."""
    return min(max(size // SHARE, least), MOST, size)


def rows(size: int, labels: npt.NDArray[np.int64] | None, num: int) -> Rows:
    """``num`` of ``range(size)``, ascending: a function of each index, the labels and nothing else.

    With labels, each class by its share, and never all of a class: of one with a single image none, and so fewer than
    ``num`` where there is nothing else.  The rows for a smaller number are among those for a larger one.
    """
    drawn = rng.words(_SEED, "held out", np.arange(size), num=2)
    key = drawn[:, 0] << np.uint64(32) | drawn[:, 1]
    if labels is None:
        return np.sort(np.argsort(key, kind="stable")[:num])
    order = np.lexsort((key, labels))
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    place, of = np.arange(size) - np.repeat(start, count), np.repeat(count, count)
    # Each stands at its quantile within its class, so the first ones of the merged order are stratified.
    quantile = np.where(place < of - 1, (place + 0.5) / of, np.inf)
    first = np.lexsort((key[order], quantile))[:num]
    return np.sort(order[first[np.isfinite(quantile[first])]])


def others(size: int, held: Rows) -> Rows:
    """The rows of ``range(size)`` that are not held out."""
    return np.setdiff1d(np.arange(size), held, assume_unique=True)
