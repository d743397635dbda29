"""A module spread over real gloo ranks by DDP: equal gradients, equal starts, restarts to the last bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit.full_batch import RunOnRanks
from sslx import distributed, parallel

CPU = torch.device("cpu")


def steps(net: nn.Module, wrapped: nn.Module, first: int, num: int) -> list[Tensor]:
    """Gradients of the last of some steps whose data depend on step and rank only."""
    for step in range(first, first + num):
        seed = torch.Generator().manual_seed(10 * step + distributed.rank())
        net.zero_grad(set_to_none=True)
        wrapped(torch.randn(4, 300, generator=seed)).square().mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def restarts() -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of step 2 of a run that goes on, and of one that starts there."""
    gradients: list[list[Tensor]] = []
    for first in (0, 2):
        torch.manual_seed(0)
        # Above 1 MiB, DDP's size of a first bucket; the order of use is not that of definition.
        layers = [nn.Linear(300, 700), nn.Linear(700, 500), nn.Linear(500, 300)]
        net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        net = nn.Sequential(*net, nn.ReLU(), nn.Linear(300, 11))
        wrapped = parallel.wrap(net, device=CPU)
        gradients.append(steps(net, wrapped, first, 3 - first))
    return gradients[0], gradients[1]


def test_a_restart_is_bitwise_on_three_ranks(ranks: RunOnRanks) -> None:
    for went_on, started in ranks(3, restarts):
        assert len(went_on) == len(started) == 8
        assert all(torch.equal(a, b) for a, b in zip(went_on, started, strict=True))


def wraps() -> tuple[Any, ...]:
    rank = distributed.rank()
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    net[1].running_mean.fill_(rank)
    wrapped = parallel.wrap(net, device=CPU)
    untouched = all(p.grad is None for p in net.parameters()) and "forward" not in vars(net)
    compiled = torch.compile(wrapped, backend="eager")
    same = parallel.unwrap(wrapped) is net and parallel.unwrap(compiled) is net
    net.eval()
    x = torch.full((1, 3), float(rank + 1), dtype=torch.float64)
    wrapped(x)[0, 0].backward()
    return untouched, same, net[1].running_mean.tolist(), net[0].weight.detach(), net[0].weight.grad[0].tolist()


def test_wrap_averages_gradients_and_starts_equal(ranks: RunOnRanks) -> None:
    first, second = ranks(2, wraps)
    assert torch.equal(first[3], second[3])
    for untouched, same, running_mean, _, grad in (first, second):
        assert (untouched, same, running_mean) == (True, True, [0, 0])
        assert grad == pytest.approx([1.5 / (1 + 1e-5) ** 0.5] * 3)


def test_one_rank_needs_no_wrapping() -> None:
    net = nn.Linear(2, 2)
    assert parallel.wrap(net, device=CPU) is net
    assert parallel.unwrap(net) is net
