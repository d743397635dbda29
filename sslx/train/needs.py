"""How much memory a step will take, measured on two samples before training, and whether the machine has it."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.data.views import ViewSpec
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.machine import limits
from sslx.methods.base import Method

_FEW = 2
_BESIDE = 1.3
"""With what gradients of activations and workspaces take beside what is kept for the backward."""
_STATES = {"sgd": 1, "lars": 1, "adamw": 2}
"""Tensors that an optimizer keeps for each parameter."""


def of_step(
    method: Method, specs: Sequence[ViewSpec], samples: int, optimizer: str, autocast: torch.dtype | None
) -> float:
    """Bytes that a rank takes in a step of so many samples at a time: an estimate, as good as a factor of 1.5.

    method: on the CPU, as it was made, not compiled; it and the random state stay as they are.
    """
    few, more = (_kept(method, specs, number, autocast) for number in (_FEW, 2 * _FEW))
    parameters = sum(p.numel() * p.element_size() for p in method.parameters())
    activations = few + (more - few) / _FEW * (samples - _FEW)  # casts of weights do not grow with the samples
    return _BESIDE * activations + parameters * (2 + _STATES[optimizer])


def _kept(method: Method, specs: Sequence[ViewSpec], samples: int, autocast: torch.dtype | None) -> int:
    """Bytes that so many samples keep for the backward."""
    twin, kept = copy.deepcopy(method).train(), dict[int, int]()
    for module in twin.modules():
        if isinstance(module, SyncBatchNorm):
            module.eval()  # keeps as much, and asks no other rank
    weights = {p.untyped_storage().data_ptr() for p in twin.parameters()}
    alive: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(saved)  # so that no other tensor gets its place
        return saved

    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", autocast, enabled=autocast is not None):
        dtype, channels = next(twin.parameters()).dtype, method.encoder.recipe.channels
        views = tuple(torch.rand(samples, channels, spec.size, spec.size, dtype=dtype) for spec in specs)
        views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
        label, index = torch.zeros(samples, dtype=torch.int64), torch.arange(samples)
        drawn = method.draw(Draws(seed=0, epoch=0, batch=0, index=index.numpy()))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            twin.embed(Batch(views, label, index, tuple(map(torch.from_numpy, drawn))))
    return sum(kept.values())


def available(device: torch.device) -> float:
    """Bytes that are free there now; inf where that cannot be found out."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return limits.free_memory()


def words(needed: float, free: float, batch_size: int, ranks: int) -> list[str]:
    """A line where so many ranks, each needing so many bytes, come close to what is free; else none."""
    if needed * ranks < 0.8 * free:
        return []
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    return [
        f"memory: a step takes about {needed / 2**30:.1f} GiB{each}, and {free / 2**30:.1f} GiB are free: it may "
        f"be ended by the system; take --grad-cache-chunks 4 (slower, the same loss), --batch-size "
        f"{max(2, batch_size // 4)} or a smaller --data.size"
    ]
