"""Operations on some of the samples of a batch, which is processed in parts."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor


def selected(flag: npt.NDArray[np.float32], part: slice) -> tuple[npt.NDArray[np.int64], slice]:
    """Return a part's flagged samples, counted from its start, and their slice among all flagged samples."""
    num_before, chosen = int(np.count_nonzero(flag[: part.start])), np.flatnonzero(flag[part])
    return chosen, slice(num_before, num_before + len(chosen))


def changed(
    pixels: Tensor, part: slice, chosen: npt.NDArray[np.int64], rows: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply ``change`` to the chosen samples of (N, ...).  rows: their rows in the batch, on the device.

    The result may be the same tensor, changed in place, or another one.
    """
    if len(chosen) == len(pixels):  # common on CPUs, where large views are processed one at a time
        return change(pixels)
    rows = rows - part.start if part.start else rows
    return pixels.index_copy_(0, rows, change(pixels.index_select(0, rows)))
