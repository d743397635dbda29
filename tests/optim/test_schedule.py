"""Learning rate and weight decay over a training: published formulas, every optimizer, and what has no decay."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from sslx.optim import Config, Schedule, build
from sslx.optim.schedule import cosine, warmup_cosine

STEPS = 40


class Block(nn.Module):
    """A trunk of one layer without blocks, beside a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(3, 4), nn.Linear(4, 2)


def lr_at(step: int, config: Config) -> float:
    """SimCLR's: a line to the peak, then half a cosine to 0; steps are taken at their middle."""
    share, warmup = (step + 0.5) / STEPS, config.warmup
    if share < warmup:
        return config.lr * share / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def decay_at(step: int, start: float, end: float) -> float:
    """``cosine_scheduler`` of DINO's utils.py."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step + 0.5) / STEPS))


@pytest.mark.parametrize(("start", "end"), [(0.04, 0.4), (0.3, 0.0), (0.0, 0.2)])
def test_both_follow_their_formulas(start: float, end: float) -> None:
    config = Config(name="adamw", lr=0.02, lr_scaling="none", warmup=0.25, weight_decay=start, weight_decay_end=end)
    schedule, optimizer = Schedule.of(config, 64), build(config, Block())
    for step in range(STEPS):
        log = schedule.apply(optimizer, (step + 0.5) / STEPS)
        weights, others = optimizer.param_groups
        expected = lr_at(step, config), decay_at(step, start, end)
        assert (log["lr"], log["weight_decay"]) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert (weights["lr"], weights["weight_decay"]) == (log["lr"], log["weight_decay"])
        assert (others["lr"], others["weight_decay"]) == (log["lr"], 0.0)


def test_without_an_end_the_weight_decay_keeps_its_bits_and_is_not_logged() -> None:
    config = Config(name="sgd", weight_decay=0.1 + 0.2)
    schedule, optimizer = Schedule.of(config, 512), build(config, Block())
    for step in range(STEPS):
        assert schedule.apply(optimizer, (step + 0.5) / STEPS).keys() == {"lr"}
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1 + 0.2, 0.0]
    assert schedule.peak_lr == pytest.approx(0.6)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_weights_shrink_by_the_schedule_alone_where_the_gradient_is_zero(name: Any) -> None:
    """By lr * decay * w a step; under LARS a step's length is trust * lr * |w|, as long as there is any decay."""
    decay: dict[str, Any] = {"weight_decay": 0.0, "weight_decay_end": 0.3}
    config = Config(name=name, lr=0.5, lr_scaling="none", warmup=0.1, momentum=0.0, trust=0.1, **decay)
    net = Block().double()
    schedule, optimizer = Schedule.of(config, 8), build(config, net)
    before = {parameter_name: parameter.detach().clone() for parameter_name, parameter in net.named_parameters()}
    factor = 1.0
    for step in range(STEPS):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        schedule.apply(optimizer, (step + 0.5) / STEPS)
        optimizer.step()
        factor *= 1 - lr_at(step, config) * (0.1 if name == "lars" else decay_at(step, 0.0, 0.3))
    assert factor < 0.9
    for parameter_name, parameter in net.named_parameters():
        expected = before[parameter_name] * (factor if parameter.ndim > 1 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=0)


# ---- the functions themselves


@pytest.mark.parametrize(("progress", "expected"), [(0, 0.996), (0.5, 0.998), (1, 1.0), (-1, 0.996), (2, 1.0)])
def test_cosine_of_byol(progress: float, expected: float) -> None:
    assert cosine(progress, 0.996, 1.0) == pytest.approx(expected, abs=1e-15)


def test_cosine_is_byols_formula() -> None:
    for step in range(0, 1001, 37):
        byol = 1 - (1 - 0.99) * (math.cos(math.pi * step / 1000) + 1) / 2
        assert cosine(step / 1000, 0.99, 1.0) == pytest.approx(byol, abs=1e-15)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 0), (0.05, 0.5), (0.1, 1), (0.55, 0.505), (1, 0.01), (1.5, 0.01), (-0.1, 0)],
)
def test_warmup_cosine(progress: float, expected: float) -> None:
    assert warmup_cosine(progress, warmup=0.1, final=0.01) == pytest.approx(expected, abs=1e-12)


def test_warmup_cosine_has_no_jump_where_the_line_ends() -> None:
    before, after = (warmup_cosine(0.3 + d, warmup=0.3) for d in (-1e-9, 1e-9))
    assert before == pytest.approx(1, abs=1e-8)
    assert after == pytest.approx(1, abs=1e-8)


def test_warmup_may_be_nothing_or_everything() -> None:
    assert warmup_cosine(0, warmup=0) == 1
    assert warmup_cosine(0.25, warmup=1) == 0.25
    assert warmup_cosine(1, warmup=1) == 1
