"""What a batch brings from the host to its device: on a GPU in one pinned buffer, by one copy that nobody waits for.

A copy from memory that is not pinned may make the host wait until the GPU has done all that it was given before, and
each copy costs a launch, so that the parameters of all views, the labels and the draws of a batch travel together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Arrays = dict[str, npt.NDArray[Any]]
Along = Callable[[int], Arrays]
"""What else of batch t is to come to the device, beside what its views need."""
Made = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""A batch's views, and what came along."""
_ALIGNED = 64  # bytes: where each array begins, for any type and for wide loads


def nothing(_: int) -> Arrays:
    """For batches of views alone."""
    return {}


def send(groups: Sequence[Mapping[str, npt.NDArray[Any]]], device: torch.device) -> list[dict[str, Tensor]]:
    """The arrays as tensors on a device, under the same names.

    On a CPU the tensors are the arrays' own memory.  On a GPU they are parts of one, and the pinned buffer is given out
    again by torch once the copy is done: the arrays may be written over when this returns.
    """
    if device.type != "cuda":
        return [{name: torch.from_numpy(array).to(device) for name, array in group.items()} for group in groups]
    places: list[tuple[int, int]] = []
    end = 0
    for group in groups:
        for array in group.values():
            start = -(-end // _ALIGNED) * _ALIGNED
            end = start + array.nbytes
            places.append((start, end))
    if not places:
        return [{} for _ in groups]
    host = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for (start, stop), array in zip(places, (array for group in groups for array in group.values()), strict=True):
        host[start:stop].copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    there, parts = host.to(device, non_blocking=True), iter(places)
    return [
        {name: _as(there[slice(*next(parts))], torch.from_numpy(array)) for name, array in group.items()}
        for group in groups
    ]


def _as(data: Tensor, like: Tensor) -> Tensor:
    """(bytes,) uint8 as the type and shape of another tensor."""
    return data.view(like.dtype).view(like.shape)
