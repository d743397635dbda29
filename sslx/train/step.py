"""One optimizer step, as the training loop and the benchmarks run it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslx import optim
from sslx.data.batch import Batch
from sslx.machine import memory
from sslx.methods.base import Embedded, Method, Step
from sslx.parallel import unwrap
from sslx.train import finite


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    progress: float,
    autocast: torch.dtype | None,
    clip: float = 0.0,
) -> dict[str, Tensor]:
    """Run forward and backward of each micro-batch, then one update.  Nothing here waits for the device.

    model: a Method, or DDP around one.  batches: one per accumulation step.  progress: in [0, 1], the fraction of the
      training that is done.
    clip: the maximum norm of the gradient of all micro-batches and ranks, which is scaled down to it; 0 turns that off.
    Returns the mean ``loss`` and the last micro-batch's metrics, detached, and two more, all on the device.
    ``grad_norm``, () float64, is the norm of that gradient before clipping, the same on all ranks.  ``taken``, () bool,
    says whether loss and gradients were finite on all ranks; if not, parameters, optimizer and buffers stay unchanged.
    """
    method, before = _begin_step(model, optimizer, progress)
    losses: list[Tensor] = []
    metrics: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        with _average_if(model, number == len(batches) - 1):
            with _autocast(method, autocast):
                step: Step = model(batch)
            (step.loss / len(batches)).backward()
        losses.append(step.loss.detach())
        metrics = step.metrics
    loss = torch.stack(losses).mean()
    return {"loss": loss, **metrics, **_update(method, optimizer, loss, before, clip)}


def cached_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    progress: float,
    autocast: torch.dtype | None,
    clip: float = 0.0,
) -> dict[str, Tensor]:
    """Do as ``train_step``, with one loss over all micro-batches in the memory of one (arXiv 2101.06983).

    This is gradient caching: the micro-batches are embedded without a graph, the loss of all embeddings gives each
    embedding's gradient, and then each micro-batch is embedded again and its gradient propagated back.  The result is
    exact except for batch norm, by which a sample's embedding depends on the others of its micro-batch.  Parameters of
    the loss itself are not averaged over ranks.
    """
    method, before = _begin_step(model, optimizer, progress)
    states = list[list[Tensor]]()  # so that dropout is the same in the second pass
    parts = list[Embedded]()
    with torch.no_grad(), _autocast(method, autocast):
        for batch in batches:
            states.append(_generator_states(method.progress.device))
            parts.append(method.embedder(batch))
    before.put_back()  # running statistics change once a step, in the second pass
    compared = tuple(torch.cat(z).requires_grad_() for z in zip(*(part.compared for part in parts), strict=True))
    given = tuple(torch.cat(z) for z in zip(*(part.given for part in parts), strict=True))
    with _autocast(method, autocast):
        step = method.loss(Embedded(compared, given))
    step.loss.backward()
    gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in compared]
    cotangents = [g.split([len(part.compared[i]) for part in parts]) for i, g in enumerate(gradients)]
    for number, (batch, state) in enumerate(zip(batches, states, strict=True)):
        _restore_generators(method.progress.device, state)
        with _average_if(model, number == len(batches) - 1):
            with _autocast(method, autocast):
                second_pass: Step = model(batch, [parts_of_z[number] for parts_of_z in cotangents])
            second_pass.loss.backward()
    loss = step.loss.detach()
    return {"loss": loss, **step.metrics, **_update(method, optimizer, loss, before, clip)}


def _begin_step(model: nn.Module, optimizer: torch.optim.Optimizer, progress: float) -> tuple[Method, finite.Buffers]:
    """Start a step at this progress; return the method and a copy of its buffers from before the step."""
    optimizer.zero_grad(set_to_none=True)
    method = unwrap(model)
    assert isinstance(method, Method)
    method.progress.fill_(progress)
    return method, finite.Buffers(method)


def _update(
    method: Method, optimizer: torch.optim.Optimizer, loss: Tensor, before: finite.Buffers, clip: float
) -> dict[str, Tensor]:
    """Take the step, or leave no trace of it if it is not finite; return its ``grad_norm`` and ``taken``.

    DDP has averaged the gradients, so they, their norm and the clipping are the same on all ranks.  Whether the step is
    taken is decided by the norm before clipping, because clipping would turn infinity into nan.
    """
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = optim.global_norm(gradients)
    taken = finite.agreed(loss, norm)
    if clip > 0:
        optim.clip_by_norm(gradients, norm, clip)
    finite.step_if(taken, optimizer)
    before.put_back(unless=taken)
    method.progress.masked_fill_(~taken, 1.0)  # at which ``after_step`` changes nothing
    method.after_step()
    if method.encoder_average is not None:
        method.encoder_average.follow(method.progress)
    memory.reuse_freed(loss.device)
    return {"grad_norm": norm, "taken": taken}


def _average_if(model: nn.Module, is_last: bool) -> AbstractContextManager[object]:
    """Average the gradients over ranks in the last backward of a step only."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext()


def _autocast(method: Method, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return torch.autocast(method.progress.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
