"""What a batch brings from the host to its device: on a GPU in one pinned buffer, by one copy that nobody waits for.

A copy from memory that is not pinned may make the host wait until the GPU has done all that it was given before, and
each copy costs a launch, so that the parameters of all views, the labels and the draws of a batch travel together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

Arrays = dict[str, npt.NDArray[Any]]
Along = Callable[[int], Arrays]
"""What else of batch t is to come to the device, beside what its views need."""
Made = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""A batch's views, and what came along."""
Group = Mapping[str, npt.NDArray[Any]] | Mapping[str, Tensor]
_ALIGNED = 64  # bytes: where each array begins, for any type and for wide loads


def nothing(_: int) -> Arrays:
    """For batches of views alone."""
    return {}


def send(groups: Sequence[Group], device: torch.device) -> list[dict[str, Tensor]]:
    """Arrays, or tensors of the host, as tensors on a device, under the same names.

    On a CPU they share the arrays' memory.  On a GPU they are parts of one copy; torch gives the pinned buffer out
    again once the copy is done, so that the arrays may be written over when this returns.
    """
    tensors = [{name: _tensor(array) for name, array in group.items()} for group in groups]
    if device.type == "cpu" or not any(tensors):
        return tensors
    return unpack(pack(tensors, pinned=device.type == "cuda").to(device, non_blocking=True), tensors)


def pack(groups: Sequence[Mapping[str, Tensor]], *, pinned: bool) -> Tensor:
    """(bytes,) uint8: the tensors one after another."""
    tensors = [tensor for group in groups for tensor in group.values()]
    places = _places(tensors)
    buffer = torch.empty(places[-1].stop, dtype=torch.uint8, pin_memory=pinned)
    for tensor, place in zip(tensors, places, strict=True):
        buffer[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return buffer


def unpack(buffer: Tensor, like: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The parts of a packed buffer, which may be on another device by now, as what was packed."""
    places = iter(_places([tensor for group in like for tensor in group.values()]))
    return [
        {name: buffer[next(places)].view(tensor.dtype).view(tensor.shape) for name, tensor in group.items()}
        for group in like
    ]


def _places(tensors: Sequence[Tensor]) -> list[slice]:
    places, end = list[slice](), 0
    for tensor in tensors:
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + tensor.nbytes
        places.append(slice(start, end))
    return places


def _tensor(array: npt.NDArray[Any] | Tensor) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
