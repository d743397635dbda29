"""One optimizer step: accumulation, and nothing in it that waits for the device."""

from contextlib import AbstractContextManager

import pytest
import torch

from sslx import data, encoders, methods, optim, rng
from sslx.config import load
from sslx.data import sources
from sslx.data.batch import Batch
from sslx.methods.base import Method
from sslx.train.step import train_step

FLAGS = [
    "--data.source", "synthetic", "--data.num-synthetic", "32", "--data.size", "8", "--batch-size", "8",
    "--encoder.layers", "1", "1", "1", "1", "--encoder.channels", "8", "8", "8", "8",
    "--method.hidden-dim", "8", "--method.projection-dim", "8", "--data.backend", "torchvision", "--data.threads", "0",
]  # fmt: skip


def build(flags: list[str], dtype: torch.dtype) -> tuple[Method, torch.optim.Optimizer, list[Batch]]:
    settings = load([*FLAGS, *flags])
    rng.seed_torch(0)
    file = methods.module("simclr")
    loader = data.training(
        settings.data,
        sources.build(settings.data, "pretrain"),
        file.views(settings.method, settings.augment, 8),
        batch_size=8,
        seed=0,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    method = file.Method(settings.method, encoders.build(settings.encoder, 8)).to(dtype)
    return method, optim.build(settings.optim, method), [next(loader) for _ in range(2)]


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_nothing_waits_for_the_device(name: str, no_host_sync: AbstractContextManager[object]) -> None:
    method, optimizer, batches = build(["--optim.name", name], torch.float32)
    before = [p.detach().clone() for p in method.parameters()]
    train_step(method, batches[:1], optimizer, torch.zeros(()), torch.bfloat16)  # makes the optimizer's state
    with no_host_sync:
        metrics = train_step(method, batches[1:], optimizer, torch.zeros(()), torch.bfloat16)
    assert metrics["loss"].dtype == torch.float32, "losses are in fp32, also under autocast"
    assert metrics["loss"].isfinite()
    changed = [not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True)]
    assert all(changed)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches() -> None:
    method, optimizer, batches = build(["--optim.name", "sgd", "--optim.lr", "1e-30"], torch.float64)
    both = train_step(method, batches, optimizer, torch.zeros(()), None)
    found = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    single: list[list[torch.Tensor]] = []
    losses: list[torch.Tensor] = []
    for batch in batches:
        losses.append(train_step(method, [batch], optimizer, torch.zeros(()), None)["loss"])
        single.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
    torch.testing.assert_close(both["loss"], torch.stack(losses).mean())
    for mine, first, second in zip(found, *single, strict=True):
        torch.testing.assert_close(mine, (first + second) / 2, rtol=1e-9, atol=1e-12)
