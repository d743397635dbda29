"""How a module is distributed over ranks: DDP, its gradient buckets, and each rank's own buffers."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslx import distributed


def wrap(module: nn.Module, *, device: torch.device) -> nn.Module:
    """Wrap a module in DDP, which averages gradients over ranks.  On one rank, return the module itself.

    device: where the module's parameters are.  Weights and buffers start as rank 0's.  From then on each rank keeps
    its own buffers, which DDP would otherwise overwrite with rank 0's before each forward: see ``share_buffers``.
    """
    if distributed.world_size() == 1:
        return module
    share_buffers(module)
    # torch 2.15 renamed the option and warns about the old name.
    parameters = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(module, [device] if device.type == "cuda" else None, **options)
    _fix_buckets(wrapped)
    return wrapped


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks, with one broadcast per dtype.

    During training, ranks differ in the running statistics of unsynchronized batch norms, which only evaluation
    reads.  All other buffers, such as queues and centers, are computed from data that all ranks share.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers() if distributed.world_size() > 1 else ():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        distributed.broadcast(flat)
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _fix_buckets(wrapped: DistributedDataParallel) -> None:
    """Fix DDP's gradient buckets now, with a backward of zeros.

    DDP rebuilds them in the order of the gradients after its first backward.  A ring sums each part of a bucket in a
    different order of ranks, so with three or more ranks, the first step after a restart differed in the last bit from
    the same step of an uninterrupted run.
    """
    module: nn.Module = wrapped.module
    own_forward = vars(module).get("forward")

    def zero(_: Tensor) -> Tensor:
        sums = [p.sum() for p in module.parameters() if p.requires_grad]
        return torch.stack([s.float() for s in sums]).sum() * 0

    module.forward = zero
    try:
        wrapped(torch.zeros(1)).backward()  # with device_ids, DDP takes no call without an argument
    finally:
        del module.forward
        if own_forward is not None:
            module.forward = own_forward
    module.zero_grad(set_to_none=True)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DDP and torch.compile, in any order."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        inner = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
        module = cast(nn.Module, inner)
    return module
