"""Barlow Twins: its projector, its loss against the paper's sums, the full batch's gradients at any world size."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import full_batch, tiny
from sslx.losses import barlow_twins
from sslx.methods import barlow_twins as method_file
from sslx.methods.base import Embedded

WEIGHT = 0.3  # of the off-diagonal: as large as the diagonal's, so that an error in either shows


def by_sums(z1: Sequence[Any], z2: Sequence[Any], weight: float) -> tuple[Any, Any, Any]:
    """Equations 1 and 2 entry by entry, on rows of floats or of scalar tensors: (loss, mean C_ii, rms C_ij)."""
    n, d = len(z1), len(z1[0])
    columns: list[list[list[Any]]] = []
    for z in (z1, z2):
        means = [sum(row[i] for row in z) / n for i in range(d)]
        roots = [(sum((row[i] - means[i]) ** 2 for row in z) / n + 1e-5) ** 0.5 for i in range(d)]
        columns.append([[(row[i] - means[i]) / roots[i] for row in z] for i in range(d)])
    c = [[sum(a * b for a, b in zip(x, y, strict=True)) / n for y in columns[1]] for x in columns[0]]
    diagonal = [c[i][i] for i in range(d)]
    others = [c[i][j] ** 2 for i in range(d) for j in range(d) if i != j]
    loss = sum((1 - x) ** 2 for x in diagonal) + weight * sum(others)
    return loss, sum(diagonal) / d, (sum(others) / len(others)) ** 0.5


def two_views(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (num, 6) in fp64 of two views that are alike."""
    x, noise = torch.randn(2, num, 6, dtype=torch.float64, generator=generator)
    return x, x + 0.5 * noise


@pytest.mark.parametrize("num", [2, 9])
def test_the_loss_and_its_metrics_are_the_papers_sums(num: int, generator: torch.Generator):
    z1, z2 = two_views(num, generator)
    loss, metrics = barlow_twins(z1, z2, WEIGHT)
    expected = by_sums(z1.tolist(), z2.tolist(), WEIGHT)
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)
    assert metrics["on_diagonal"].item() == pytest.approx(expected[1], rel=1e-6)
    assert metrics["off_diagonal"].item() == pytest.approx(expected[2], rel=1e-6)


def oracle(z1: Tensor, z2: Tensor) -> Tensor:
    return by_sums(list(z1), list(z2), WEIGHT)[0]


@pytest.mark.parametrize(("world_size", "num"), [(1, 6), (2, 6), (3, 3), pytest.param(3, 6, marks=pytest.mark.slow)])
def test_ranks_give_the_full_batch_loss_and_gradient(
    world_size: int, num: int, ranks: full_batch.RunOnRanks, generator: torch.Generator
):
    inputs, weight = two_views(num, generator), torch.randn(6, 4, dtype=torch.float64, generator=generator)
    loss, bugs = partial(barlow_twins, off_diagonal_weight=WEIGHT), ["sum_over_ranks_grad"]
    full_batch.check(ranks, world_size, loss, oracle, inputs, weight, bugs=bugs)


def make(**options: Any) -> method_file.Method:
    return method_file.Config(**{"hidden_dim": 24, "projection_dim": 12, **options}).build(tiny.identity())


def test_the_projector_is_the_papers():
    """Linear, BN, ReLU, twice, then a linear layer; none has a bias (2103.03230, 2.2 and its code)."""
    layers = list(make().projector)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert tiny.linear_widths(make().projector) == [(16, 24), (24, 24), (24, 12)]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Linear))


def test_the_method_weighs_the_loss_and_tells_how_it_goes(generator: torch.Generator):
    z = torch.randn(512, 12, generator=generator)
    step = make(off_diagonal_weight=WEIGHT).loss(Embedded((z, z)))
    collapsed = make().loss(Embedded((z[:1].expand(512, 12),) * 2)).metrics
    torch.testing.assert_close(step.loss, barlow_twins(z, z, WEIGHT)[0])
    assert step.metrics.keys() == {"on_diagonal", "off_diagonal", "std"}
    assert step.metrics["on_diagonal"] == pytest.approx(1, abs=1e-3)
    assert step.metrics["off_diagonal"] < 0.1  # 1 / sqrt(N) of independent dimensions
    assert step.metrics["std"] == pytest.approx(1, abs=0.1)
    assert collapsed["std"] < 1e-3
    assert collapsed["on_diagonal"] < 1e-3


def test_one_dimension_has_no_others(generator: torch.Generator):
    z1, z2 = torch.randn(2, 8, 1, generator=generator)
    loss, metrics = barlow_twins(z1, z2)
    assert math.isfinite(loss)
    assert metrics["off_diagonal"] == 0
