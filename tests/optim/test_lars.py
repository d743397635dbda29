"""LARS against its definition, parameter by parameter in Python's own floats."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from sslx.optim import LARS
from sslx.optim.groups import split

LR, MOMENTUM, DECAY, TRUST = 0.3, 0.9, 1e-2, 0.001


def flat(x: torch.Tensor | None) -> list[float]:
    assert x is not None
    return x.double().flatten().tolist()


class Definition:
    """One tensor under LARS, as in SimCLR's lars_optimizer.py without Nesterov."""

    def __init__(self, p: torch.Tensor, momentum: float) -> None:
        self.p, self.v, self.adapt, self.momentum = flat(p), [0.0] * p.numel(), p.ndim > 1, momentum

    def step(self, grad: list[float], lr: float) -> None:
        d = [g + DECAY * p for g, p in zip(grad, self.p, strict=True)] if self.adapt else grad
        above, below = math.hypot(*self.p), math.hypot(*d)
        ratio = TRUST * above / below if self.adapt and above > 0 and below > 0 else 1.0
        self.v = [self.momentum * v + lr * ratio * x for v, x in zip(self.v, d, strict=True)]
        self.p = [p - v for p, v in zip(self.p, self.v, strict=True)]


def make(dtype: torch.dtype = torch.float64) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    nn.init.zeros_(net[3].weight)  # norm 0: ratio 1
    return net.to(dtype)


def backward(net: nn.Module, generator: torch.Generator) -> None:
    parameter = next(net.parameters())
    x = torch.randn(8, 2, 4, 4, generator=generator).to(parameter)
    net.zero_grad()
    net(x).sub(1).square().mean().backward()


def lars(net: nn.Module, momentum: float = MOMENTUM) -> LARS:
    return LARS(split(net), LR, momentum=momentum, weight_decay=DECAY, trust=TRUST)


@pytest.mark.parametrize("momentum", [MOMENTUM, 0.0])
def test_is_the_definition(momentum: float, generator: torch.Generator) -> None:
    net = make()
    optimizer = lars(net, momentum)
    expected = [Definition(p, momentum) for p in net.parameters()]
    for step in range(5):
        lr = LR * (step + 1) / 5
        backward(net, generator)
        if step == 2:
            net[0].weight.grad = torch.zeros_like(net[0].weight)
        for p, definition in zip(net.parameters(), expected, strict=True):
            definition.step(flat(p.grad), lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for p, definition in zip(net.parameters(), expected, strict=True):
            assert flat(p) == pytest.approx(definition.p, rel=1e-12, abs=1e-14)


def test_a_zero_gradient_without_decay_leaves_the_tensor() -> None:
    p = nn.Parameter(torch.randn(3, 3))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    LARS([p], 1.0).step()
    assert torch.equal(p, before)


def test_parameters_without_gradient_stay(generator: torch.Generator) -> None:
    net = make()
    optimizer = lars(net)
    backward(net, generator)
    net[0].weight.grad = None
    before = net[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert not torch.equal(net[3].weight, torch.zeros_like(net[3].weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_launches_for_all_tensors_make_the_same_bits(
    dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, no_host_sync: Any
) -> None:
    """What a GPU runs, on the CPU: channels_last too, with a step left out and one tensor without a gradient."""
    nets = [make(dtype).to(memory_format=torch.channels_last)]
    nets.append(copy.deepcopy(nets[0]))
    optimizers = [lars(net) for net in nets]
    for step in range(5):
        for launched, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            monkeypatch.setattr("sslx.optim.lars._launches_kernels", lambda _, launched=launched: bool(launched))
            if launched:
                for mine, other in zip(net.parameters(), nets[0].parameters(), strict=True):
                    mine.grad = None if other.grad is None else other.grad.clone()
            else:
                backward(net, generator)
                net[0].weight.grad = None if step == 3 else net[0].weight.grad
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.param_groups[0]["lr"] = LR * (step + 1) / 5
            with no_host_sync:
                optimizer.step()
        assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters())), step
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys() == set(range(6))
    assert all(torch.equal(states[0][number]["velocity"], states[1][number]["velocity"]) for number in range(6))


def test_norms_of_bf16_are_in_fp32() -> None:
    p = nn.Parameter(torch.full((300, 300), 1 / 3, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.75)
    before = flat(p)[0]
    LARS([p], 1.0, trust=0.5).step()
    assert flat(p)[0] == pytest.approx(before / 2, rel=2**-8)


def test_closure_is_called_with_gradients() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p], 1.0, trust=0.5)

    def closure() -> float:
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert flat(p) == pytest.approx([0.5] * 4)
