"""Estimate the memory of a step from two small batches before training, and compare it with what the machine has."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.data.text import TextSpec
from sslx.data.views import ViewSpec
from sslx.encoders.sync_bn import SyncBatchNorm
from sslx.machine import limits
from sslx.methods.base import Method

_NUM_SAMPLES = 2
_OVERHEAD = 1.3
"""Factor for gradients of activations and for workspaces, besides the tensors kept for the backward."""
_STATES = {"sgd": 1, "lars": 1, "adamw": 2}
"""Number of tensors that an optimizer keeps for each parameter."""


def step_bytes(
    method: Method,
    specs: Sequence[ViewSpec],
    num_samples: int,
    optimizer: str,
    autocast: torch.dtype | None,
    text: TextSpec | None = None,
) -> float:
    """Estimate the bytes that a rank needs for a step, accurate to a factor of 1.5.

    num_samples: in a micro-batch.  method: on the CPU, newly built, not compiled.  It and the random state are not
    changed.
    """
    few, more = (_kept_bytes(method, specs, number, autocast, text) for number in (_NUM_SAMPLES, 2 * _NUM_SAMPLES))
    parameters = sum(p.numel() * p.element_size() for p in method.parameters())
    per_sample = (more - few) / _NUM_SAMPLES
    activations = few + per_sample * (num_samples - _NUM_SAMPLES)  # casts of weights do not grow with the samples
    return _OVERHEAD * activations + parameters * (2 + _STATES[optimizer])


def _kept_bytes(
    method: Method, specs: Sequence[ViewSpec], num_samples: int, autocast: torch.dtype | None, text: TextSpec | None
) -> int:
    """Return the bytes that the forward of a batch keeps for the backward."""
    twin, sizes = copy.deepcopy(method).train(), dict[int, int]()
    for module in twin.modules():
        if isinstance(module, SyncBatchNorm):
            module.eval()  # keeps as many tensors, and does not communicate
    weights = {p.untyped_storage().data_ptr() for p in twin.parameters()}
    alive: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(saved)  # so that its address is not reused
        return saved

    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", autocast, enabled=autocast is not None):
        dtype, channels = next(twin.parameters()).dtype, method.encoder.recipe.channels
        views = tuple(torch.rand(num_samples, channels, spec.size, spec.size, dtype=dtype) for spec in specs)
        views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
        label, index = torch.zeros(num_samples, dtype=torch.int64), torch.arange(num_samples)
        tokens = torch.zeros(num_samples, text.length, dtype=torch.int64) if text else None
        drawn = method.draw(Draws(seed=0, epoch=0, batch=0, index=index.numpy()))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            twin.embed(Batch(views, label, index, tuple(map(torch.from_numpy, drawn)), tokens))
    return sum(sizes.values())


def free_bytes(device: torch.device) -> float:
    """Return the bytes that are free on the device now, or inf if that is unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return limits.free_memory_bytes()


def memory_warning(needed: float, free: float, batch_size: int, num_ranks: int) -> list[str]:
    """Return a line if ranks that need this many bytes each come close to what is free, else no line."""
    if needed * num_ranks < 0.8 * free:
        return []
    each = f" on each of {num_ranks} ranks" if num_ranks > 1 else ""
    return [
        f"memory: a step takes about {needed / 2**30:.1f} GiB{each}, and {free / 2**30:.1f} GiB are free: the system "
        f"may end the run; use --num-grad-cache-chunks 4 (slower, the same loss), "
        f"--batch-size {max(2, batch_size // 4)} or a smaller --data.size"
    ]
