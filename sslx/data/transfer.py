"""What a batch brings from the host to its device: on a GPU in one pinned buffer, by one copy that nobody waits for.

A copy from memory that is not pinned may make the host wait until the GPU has done all that it was given before, and
each copy costs a launch, so that the parameters of all views, the labels and the draws of a batch travel together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Arrays = dict[str, npt.NDArray[Any]]
Along = Callable[[int], Arrays]
"""What else of batch t is to come to the device, beside what its views need."""
Group = Mapping[str, npt.NDArray[Any]] | Mapping[str, Tensor]
_ALIGNED = 64  # bytes: where each array begins, for any type and for wide loads


@dataclass(frozen=True, eq=False)
class Delivery:
    """A batch as a backend makes it: (B,) the samples, the views, and what came along."""

    index: npt.NDArray[np.int64]
    views: tuple[Tensor, ...]
    along: dict[str, Tensor]


def nothing(_: int) -> Arrays:
    """For batches of views alone."""
    return {}


@dataclass(frozen=True)
class Staged:
    """Tensors of the host that can go to a device at once.  buffer: all of them, packed; None where none need it."""

    tensors: list[dict[str, Tensor]]
    device: torch.device
    buffer: Tensor | None

    def send(self) -> list[dict[str, Tensor]]:
        """The tensors on the device, under the same names.

        On a CPU they share the arrays' memory.  On a GPU they are parts of one copy; torch gives the pinned buffer out
        again once the copy is done, so that the arrays may be written over as soon as they are staged.
        """
        if self.buffer is None:
            return self.tensors
        return unpack(self.buffer.to(self.device, non_blocking=True), self.tensors)


def stage(groups: Sequence[Group], device: torch.device) -> Staged:
    """Prepare arrays, or tensors of the host, for the way to a device: all that the host has to do, in any thread."""
    tensors = [{name: _tensor(array) for name, array in group.items()} for group in groups]
    if device.type == "cpu" or not any(tensors):
        return Staged(tensors, device, None)
    return Staged(tensors, device, pack(tensors, pinned=device.type == "cuda"))


def send(groups: Sequence[Group], device: torch.device) -> list[dict[str, Tensor]]:
    """Arrays, or tensors of the host, as tensors on a device, under the same names."""
    return stage(groups, device).send()


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
