"""Code on fake CUDA tensors: its copies from the host are counted, and whatever waits for the device is refused."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique2", "_unique2")
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


@dataclass
class Seen:
    """copies: from the host to the device, (bytes, whether from pinned memory and without waiting) each."""

    copies: list[tuple[int, bool]] = field(default_factory=list[tuple[int, bool]])
    launches: int = 0


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen, self._pinned = seen, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_cuda for tensor in tensors)
        if on_device and name in WAITING:
            raise AssertionError(f"aten.{name} waits for the device")
        if on_device and name in INDEXING:
            chosen = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            assert all(index.dtype not in (torch.bool, torch.uint8) for index in chosen), f"aten.{name} by a mask waits"
            assert all(index.is_cuda for index in chosen), f"aten.{name} copies its index from the host"
        out = func(*args, **kwargs)
        if name == "empty" and kwargs.get("pin_memory"):
            self._pinned.append(out.untyped_storage()._cdata)
        if name == "_to_copy" and out.is_cuda and not args[0].is_cuda:
            self._copied(args[0], bool(kwargs.get("non_blocking")))
        if name == "copy_" and args[0].is_cuda and not args[1].is_cuda:
            self._copied(args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        self._seen.launches += on_device and not func.is_view
        return out

    def _copied(self, source: Tensor, without_waiting: bool) -> None:
        pinned = source.untyped_storage()._cdata in self._pinned
        self._seen.copies.append((source.nbytes, pinned and without_waiting))


@contextmanager
def fake() -> Generator[None]:
    """Tensors without values, on a GPU that need not be there; host tensors that come in are taken as they are."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def watched() -> Generator[Seen]:
    """AssertionError, or FakeTensorMode's own error, at whatever waits for the device or mixes devices."""
    seen = Seen()
    with _Watch(seen):
        yield seen
