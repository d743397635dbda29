"""One optimizer step.  The loop and the benchmarks run this same function."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslx.data.batch import Batch
from sslx.methods.base import Step


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    progress: Tensor,
    autocast: torch.dtype | None,
) -> dict[str, Tensor]:
    """Forward and backward of each micro-batch, then one update.  Nothing here waits for the device.

    model: a Method, or DDP around one.  batches: one per accumulation step.  progress: () on the device.
    Returns the mean ``loss`` and the last micro-batch's metrics, detached, on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        # Gradients are averaged over ranks once, in the last backward.
        local = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with local:
            with torch.autocast(progress.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                step: Step = model(batch, progress)
            (step.loss / len(batches)).backward()
        losses.append(step.loss.detach())
        metrics = step.metrics
    optimizer.step()
    return {"loss": torch.stack(losses).mean(), **metrics}
