"""Chooses the training images that stand in for a missing test split, always the same ones."""

import numpy as np
import numpy.typing as npt

from sslx import rng

INVERSE_FRACTION = 5
"""One of this many images is held out."""
MAX_IMAGES = 2_000
MIN_IMAGES_TO_SHOW = 50
"""Minimum number of held-out images if no probe trains on the remaining ones, because fewer images show little."""
_SEED = 0

Rows = npt.NDArray[np.int64]


def num_held_out(size: int, minimum: int = 1) -> int:
    """Return how many of ``size`` images to hold out: a fifth, but at least ``minimum`` (or all) and at most 2,000."""
    return min(max(size // INVERSE_FRACTION, minimum), MAX_IMAGES, size)


def rows(size: int, labels: npt.NDArray[np.int64] | None, num: int) -> Rows:
    """Return ``num`` of ``range(size)``, ascending, chosen by a hash of each index.

    With labels, the rows are stratified by class, and at least one image of each class is not chosen, so the result may
    have fewer than ``num`` rows.  The rows for a smaller ``num`` are among those for a larger one.
    """
    drawn = rng.words(_SEED, "held out", np.arange(size), num=2)
    key = drawn[:, 0] << np.uint64(32) | drawn[:, 1]
    if labels is None:
        return np.sort(np.argsort(key, kind="stable")[:num])
    order = np.lexsort((key, labels))
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    position, class_size = np.arange(size) - np.repeat(start, count), np.repeat(count, count)
    # Sorting by the quantile within the class stratifies every beginning of the order.
    quantile = np.where(position < class_size - 1, (position + 0.5) / class_size, np.inf)
    first = np.lexsort((key[order], quantile))[:num]
    return np.sort(order[first[np.isfinite(quantile[first])]])


def remaining_rows(size: int, held_out: Rows) -> Rows:
    """Return the rows of ``range(size)`` that are not held out."""
    return np.setdiff1d(np.arange(size), held_out, assume_unique=True)
