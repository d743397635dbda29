"""One optimizer step: accumulation, and nothing in it that waits for the device."""

import copy
import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch

from kit import tiny
from kit.full_batch import RunOnRanks
from sslx import data, distributed, encoders, optim, parallel, rng
from sslx.config import load
from sslx.data import sources
from sslx.data.batch import Batch
from sslx.distributed import Ranks
from sslx.encoders.group_norm import group_norm
from sslx.machine import memory
from sslx.methods.base import Embedded, Method
from sslx.train.step import cached_step, train_step

FLAGS = (
    "--source.name synthetic --source.num-samples 32 --data.size 8 --batch-size 8 --encoder.layers 1 1 1 1 "
    "--encoder.channels 8 8 8 8 --method.hidden-dim 8 --method.projection-dim 8 --data.backend torchvision "
    "--data.threads 0"
).split()
FROZEN = ["--optim.name", "sgd", "--optim.lr", "1e-30"]
both_steps = pytest.mark.parametrize("run", [train_step, cached_step])


def build(flags: list[str], dtype: torch.dtype) -> tuple[Method, torch.optim.Optimizer, list[Batch]]:
    settings = load([*FLAGS, *flags])
    rng.seed_torch(0)
    loader = data.training(
        settings.data,
        sources.build(settings.source, "pretrain"),
        settings.method.inputs(settings.augment, 8).views,
        batch_size=8,
        seed=0,
        ranks=Ranks(device=torch.device("cpu")),
        dtype=dtype,
    )
    method = settings.method.build(encoders.build(settings.encoder, 8)).to(dtype)
    return method, optim.build(settings.optim, method), [next(loader) for _ in range(2)]


@both_steps
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_nothing_waits_for_the_device(
    name: str, clip: float, run: Any, no_host_sync: AbstractContextManager[object]
) -> None:
    method, optimizer, batches = build(["--optim.name", name], torch.float32)
    before = [p.detach().clone() for p in method.parameters()]
    run(method, batches, optimizer, 0.0, torch.bfloat16)  # makes the optimizer's state
    with no_host_sync:
        metrics = run(method, batches, optimizer, 0.0, torch.bfloat16, clip)
    assert metrics["loss"].dtype == torch.float32, "losses are in fp32, also under autocast"
    assert metrics["loss"].isfinite()
    assert not any(map(torch.equal, before, method.parameters()))


@both_steps
def test_freed_memory_is_kept_from_the_first_step_on(run: Any) -> None:
    memory.reuse_freed.cache_clear()
    method, optimizer, batches = build(FROZEN, torch.float32)
    for calls in (1, 1):
        run(method, batches, optimizer, 0.0, None)
        assert memory.reuse_freed.cache_info().misses == calls


def test_accumulated_gradients_are_the_mean_of_the_micro_batches() -> None:
    method, optimizer, batches = build(FROZEN, torch.float64)
    losses, taken = list[torch.Tensor](), list[torch.Tensor]()
    for micro_batches in (batches, batches[:1], batches[1:]):
        losses.append(train_step(method, micro_batches, optimizer, 0.0, None)["loss"])
        taken.append(gradients(method))
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2)
    torch.testing.assert_close(taken[0], (taken[1] + taken[2]) / 2, rtol=1e-9, atol=1e-12)


def whole(batches: list[Batch]) -> Batch:
    views = tuple(torch.cat(v) for v in zip(*(b.views for b in batches), strict=True))
    return Batch(views, None, torch.cat([b.index for b in batches]))


def gradients(method: Method) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_gradients_are_those_of_the_whole_batch(dtype: torch.dtype) -> None:
    """All its negatives, in the memory of a chunk; with group norm, for batch norm's statistics are the chunk's."""
    method, optimizer, batches = build(FROZEN, dtype)
    group_norm(method)
    cached = cached_step(method, batches, optimizer, 0.0, None)
    ours = gradients(method)
    once = train_step(method, [whole(batches)], optimizer, 0.0, None)
    torch.testing.assert_close(cached, once)
    theirs = gradients(method)
    assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 1e-12) * theirs.norm()
    train_step(method, batches, optimizer, 0.0, None)  # accumulation has fewer negatives
    assert (gradients(method) - theirs).norm() > 0.01 * theirs.norm()


def test_cached_batch_norm_counts_each_chunk_once() -> None:
    method, optimizer, batches = build(FROZEN, torch.float64)
    cached_step(method, batches, optimizer, 0.0, None)
    ours = [buffer.clone() for buffer in method.buffers()]
    method, optimizer, batches = build(FROZEN, torch.float64)
    train_step(method, batches, optimizer, 0.0, None)
    torch.testing.assert_close(ours, list(method.buffers()))


def test_cached_dropout_drops_the_same_twice() -> None:
    method, optimizer, batches = build(FROZEN, torch.float64)
    group_norm(method)
    method.projector.append(torch.nn.Dropout(0.3))
    torch.manual_seed(1)
    cached_step(method, batches, optimizer, 0.0, None)
    ours = gradients(method)
    method.zero_grad()
    torch.manual_seed(1)
    parts = [method.embed(batch).compared for batch in batches]
    method.loss(Embedded(tuple(torch.cat(z) for z in zip(*parts, strict=True)))).loss.backward()
    torch.testing.assert_close(ours, gradients(method))


def norm_of(numbers: torch.Tensor) -> float:
    return math.sqrt(math.fsum(number**2 for number in numbers.tolist()))


@both_steps
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_the_gradient_of_all_micro_batches_is_clipped_before_the_update(name: str, run: Any) -> None:
    """As a gradient that is clipped by hand, for the same optimizer; its norm before that is a metric."""
    flags = ["--optim.name", name, "--optim.momentum", "0.5", "--optim.weight-decay", "0.1"]
    method, optimizer, batches = build(flags, torch.float64)
    other, by_hand, _ = build(flags, torch.float64)
    for _ in range(3):
        metrics = run(method, batches, optimizer, 0.0, None, 0.05)
        frozen = copy.deepcopy(other)
        run(frozen, batches, torch.optim.SGD(frozen.parameters(), 0.0, fused=True), 0.0, None)
        norm = norm_of(gradients(frozen))
        assert norm > 0.06
        assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-10)
        for parameter, same in zip(other.parameters(), frozen.parameters(), strict=True):
            parameter.grad = None if same.grad is None else same.grad * (0.05 / norm)
        by_hand.step()
        for mine, theirs in zip(method.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@both_steps
def test_a_limit_that_is_not_reached_and_none_give_the_same_bits(run: Any) -> None:
    weights = list[list[torch.Tensor]]()
    for clip in (0.0, 1e6):
        method, optimizer, batches = build(["--optim.name", "sgd"], torch.float32)
        run(method, batches, optimizer, 0.0, None, clip)
        weights.append([parameter.detach() for parameter in method.parameters()])
    assert all(map(torch.equal, *weights))


def on_this_rank(*, cached: bool = False, clip: float = 0.0, planted: bool = False) -> tuple[torch.Tensor, float]:
    """The gradient after a step on this rank's share of two batches of 8, and its norm before it was clipped.

    planted: each rank clips its own gradient, before they are averaged.
    """
    method, optimizer, batches = build(FROZEN, torch.float64)
    group_norm(method)
    size, rank = 8 // distributed.world_size(), distributed.rank()
    shares = [tiny.part(batch, slice(rank * size, (rank + 1) * size)) for batch in batches]
    model = method if planted else parallel.wrap(method, device=torch.device("cpu"))
    run = cached_step if cached else train_step
    metrics = run(model, shares if cached else [whole(shares)], optimizer, 0.0, None, clip)
    gradient = gradients(method)
    return distributed.mean_over_ranks(gradient) if planted else gradient, metrics["grad_norm"].item()


def test_two_ranks_clip_as_one(ranks: RunOnRanks) -> None:
    truth, norm = on_this_rank(clip=0.05)
    assert norm_of(truth) == pytest.approx(0.05)
    assert norm > 0.06
    results = ranks(2, partial(on_this_rank, clip=0.05))
    for clipped, before in results:
        torch.testing.assert_close(clipped, truth, rtol=1e-9, atol=1e-12)
        assert before == pytest.approx(norm, rel=1e-10)
    assert results[0][1] == results[1][1], "equal to the last bit, or the ranks would drift apart"
    for wrong, _ in ranks(2, partial(on_this_rank, clip=0.05, planted=True)):
        assert (wrong - truth).norm() > 1e-3 * truth.norm(), "a planted bug was not found"


def test_cached_gradients_on_two_ranks_are_those_of_the_whole_batch_on_one(ranks: RunOnRanks) -> None:
    truth, _ = on_this_rank()
    for gradient, _ in ranks(2, partial(on_this_rank, cached=True)):
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12)
