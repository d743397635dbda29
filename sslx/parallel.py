"""How a module is spread over ranks: DDP, its gradient buckets, and the buffers that each rank has for itself."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslx import distributed


def wrap(module: nn.Module, *, device: torch.device) -> nn.Module:
    """The module in DDP, which averages gradients over ranks; on one rank the module itself.

    device: where the module's parameters are.  Weights and buffers start as rank 0's.  From then on each rank keeps
    its own buffers, which DDP would otherwise replace by rank 0's before each forward: see ``share_buffers``.
    """
    if distributed.world_size() == 1:
        return module
    share_buffers(module)
    # torch 2.15 renamed it; the old name warns.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
    wrapped = DistributedDataParallel(module, [device] if device.type == "cuda" else None, **options)
    _settle_buckets(wrapped)
    return wrapped


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Make rank 0's buffers those of all ranks: one broadcast for each dtype.

    In training, ranks differ in the running statistics of batch norms that are not synchronised, which only
    evaluation reads.  All other buffers, such as queues and centers, come out of what all ranks have told each other.
    """
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers() if distributed.world_size() > 1 else ():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        distributed.broadcast(flat)
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Fix DDP's gradient buckets now, by a backward of zeros.

    DDP lays them out anew, in the order of the gradients, after its first backward.  A ring sums each part of
    a bucket in another order of ranks, so with three or more the first step after a restart differed in the
    last bit from the same step of a run that went on.
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
    """The module inside DDP and torch.compile, in any order."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        inner = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod
        module = cast(nn.Module, inner)
    return module
