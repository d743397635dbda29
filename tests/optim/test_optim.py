"""Optimizers by name: what decays, how the learning rate scales, and what a config may say."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from sslx.errors import ConfigError
from sslx.optim import LARS, Config, build, peak_lr

NAMES = ["lars", "sgd", "adamw"]


def make() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


@pytest.mark.parametrize("name", NAMES)
def test_decay_reaches_weights_only(name: Any) -> None:
    net = make()
    for p in net.parameters():
        nn.init.normal_(p)
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in net.parameters()]
    build(Config(name=name, lr=0.5, weight_decay=0.1, trust=0.1), net).step()
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old) == (p.ndim <= 1)
        if p.ndim > 1:
            assert p.detach().norm() < old.norm()


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_resumes(name: Any, generator: torch.Generator) -> None:
    net = make()
    optimizer = build(Config(name=name, lr=0.01, trust=0.1), net)
    x = torch.randn(16, 2, 4, 4, generator=generator)
    losses: list[float] = []
    for _ in range(20):
        loss = (net(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    other = build(Config(name=name, lr=0.01, trust=0.1), net)
    other.load_state_dict(optimizer.state_dict())
    mine, theirs = (o.state_dict()["state"] for o in (optimizer, other))
    assert mine.keys() == theirs.keys() == set(range(6))
    for index, state in mine.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[index][key]))


class Thawing(nn.Module):
    """Two weights, of which the second one's gradient is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2))

    def late_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.second,)


def test_adamw_counts_a_late_parameters_steps_from_its_first_gradient_on(
    no_host_sync: Any, generator: torch.Generator
) -> None:
    """As published code, whose frozen parameters have no gradient at all; not as torch's, which counts from step 1."""
    gradients = torch.randn(12, 2, 3, 2, dtype=torch.float64, generator=generator)
    config = Config(name="adamw", lr=0.1, weight_decay=0.0)
    ours, published, plain = (Thawing() for _ in range(3))
    theirs = torch.optim.AdamW(plain.parameters(), 0.1, weight_decay=0.0)
    optimizers = build(config, ours), torch.optim.AdamW(published.parameters(), 0.1, weight_decay=0.0), theirs
    for step, gradient in enumerate(gradients):
        for net, absent in ((ours, False), (published, True), (plain, False)):
            net.first.grad = gradient[0].clone()
            net.second.grad = gradient[1].clone() if step >= 5 else None if absent else torch.zeros(3, 2).double()
        with no_host_sync:
            optimizers[0].step()
        for optimizer in optimizers[1:]:
            optimizer.step()
        torch.testing.assert_close(ours.first, published.first)
        torch.testing.assert_close(ours.second, published.second)
    assert (plain.second - published.second).norm() > 0.1 * (published.second - 1).norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_brings_nothing_to_the_host(name: Any, no_host_sync: Any) -> None:
    net = make()
    optimizer = build(Config(name=name), net)
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with no_host_sync:
            optimizer.step()
    assert len(optimizer.state) == 6


def test_defaults_are_simclrs() -> None:
    optimizer = build(Config(), make())
    assert isinstance(optimizer, LARS)
    assert peak_lr(Config(), 4096) == pytest.approx(4.8)
    weights, others = optimizer.param_groups
    assert [p.ndim for p in weights["params"]] == [4, 2]
    assert (weights["weight_decay"], weights["adapt"], weights["momentum"]) == (1e-6, True, 0.9)
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    assert (others["weight_decay"], others["adapt"], others["trust"]) == (0.0, False, 0.001)


@pytest.mark.parametrize(
    ("scaling", "batch_size", "expected"),
    [("linear", 512, 0.6), ("sqrt", 100, 3.0), ("none", 4096, 0.3), ("linear", 64, 0.075)],
)
def test_peak_lr(scaling: Any, batch_size: int, expected: float) -> None:
    assert peak_lr(Config(lr_scaling=scaling), batch_size) == pytest.approx(expected)


WRONG: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, math.inf, math.nan), "weight_decay": (-1e-6,), "weight_decay_end": (-0.1, math.inf), "momentum": (1.0,),
    "warmup": (1.5, -0.1), "trust": (0.0,), "betas": ((0.9, 1.0),), "clip": (-1.0, math.nan), "layer_decay": (0.0, 1.1),
}  # fmt: skip


@pytest.mark.parametrize(("field", "wrong"), [(field, wrong) for field in WRONG for wrong in WRONG[field]])
def test_values_out_of_range(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^expected optim\.{field} to be .*, got .*$"):
        Config(**{field: wrong})
