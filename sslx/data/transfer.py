"""Transfer a batch's arrays from the host to its device, for a GPU in one pinned buffer by one asynchronous copy.

A copy from memory that is not pinned may make the host wait for the GPU's earlier work, and each copy costs a launch.
Therefore the parameters of all views, the labels and the draws of a batch are copied together.
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
"""Returns the arrays of batch t that go to the device beside the inputs of its views."""
Group = Mapping[str, npt.NDArray[Any]] | Mapping[str, Tensor]
_ALIGNMENT_BYTES = 64  # of each array in the buffer, enough for any type and for wide loads


@dataclass(frozen=True, eq=False)
class Delivery:
    """A batch from a backend: the samples (B,), the views, and the other arrays on the device by name."""

    index: npt.NDArray[np.int64]
    views: tuple[Tensor, ...]
    along: dict[str, Tensor]


def nothing(_: int) -> Arrays:
    """Return no arrays, for batches of views alone."""
    return {}


@dataclass(frozen=True)
class Staged:
    """Host tensors ready for a device.  buffer: all of them packed, or None if no copy is needed."""

    tensors: list[dict[str, Tensor]]
    device: torch.device
    buffer: Tensor | None

    def send(self) -> list[dict[str, Tensor]]:
        """Return the tensors on the device, under the same names.

        On a CPU they share the arrays' memory.  On a GPU they are parts of one copy, and the arrays may be overwritten
        once they are staged: torch reuses the pinned buffer only after the copy is done.
        """
        if self.buffer is None:
            return self.tensors
        return unpack(self.buffer.to(self.device, non_blocking=True), self.tensors)


def stage(groups: Sequence[Group], device: torch.device) -> Staged:
    """Do the host's part of sending arrays or host tensors to a device.  Any thread may call it."""
    tensors = [{name: _tensor(array) for name, array in group.items()} for group in groups]
    if device.type == "cpu" or not any(tensors):
        return Staged(tensors, device, None)
    return Staged(tensors, device, pack(tensors, pinned=device.type == "cuda"))


def send(groups: Sequence[Group], device: torch.device) -> list[dict[str, Tensor]]:
    """Return arrays or host tensors as tensors on a device, under the same names."""
    return stage(groups, device).send()


def pack(groups: Sequence[Mapping[str, Tensor]], *, pinned: bool) -> Tensor:
    """Pack the tensors one after another into a buffer: (num_bytes,) uint8."""
    tensors = [tensor for group in groups for tensor in group.values()]
    places = _places(tensors)
    buffer = torch.empty(places[-1].stop, dtype=torch.uint8, pin_memory=pinned)
    for tensor, place in zip(tensors, places, strict=True):
        buffer[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return buffer


def unpack(buffer: Tensor, like: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the tensors in a packed buffer, which may be on another device.  like: the tensors that were packed."""
    places = iter(_places([tensor for group in like for tensor in group.values()]))
    return [
        {name: buffer[next(places)].view(tensor.dtype).view(tensor.shape) for name, tensor in group.items()}
        for group in like
    ]


def _places(tensors: Sequence[Tensor]) -> list[slice]:
    places, end = list[slice](), 0
    for tensor in tensors:
        start = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        end = start + tensor.nbytes
        places.append(slice(start, end))
    return places


def _tensor(array: npt.NDArray[Any] | Tensor) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
