"""VICReg: its expander, its loss against the paper's sums, the full batch's gradients at any world size."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import full_batch, tiny
from sslx.losses import vicreg
from sslx.methods import vicreg as method_file
from sslx.methods.base import Embedded

Weights = tuple[float, float, float]
WEIGHTS: Weights = (2.0, 9.0, 0.7)
NAMES = ("invariance_weight", "variance_weight", "covariance_weight")


def by_sums(z1: Sequence[Any], z2: Sequence[Any], gamma: float = 1.0) -> tuple[Any, Any, Any]:
    """The paper's terms entry by entry, on rows of floats or of scalar tensors, scaled as its code does."""
    n, d = len(z1), len(z1[0])
    invariance = sum((z1[k][i] - z2[k][i]) ** 2 for k in range(n) for i in range(d)) / (n * d)
    variance: Any = 0.0
    covariance: Any = 0.0
    for z in (z1, z2):
        means = [sum(row[i] for row in z) / n for i in range(d)]
        for i in range(d):
            for j in range(d):
                c = sum((row[i] - means[i]) * (row[j] - means[j]) for row in z) / (n - 1)
                if i != j:
                    covariance = covariance + c**2 / d
                elif (c + 1e-4) ** 0.5 < gamma:
                    variance = variance + (gamma - (c + 1e-4) ** 0.5) / (2 * d)
    return invariance, variance, covariance


def weighted(terms: tuple[Any, Any, Any], weights: Weights = WEIGHTS) -> Any:
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def two_views(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(num, 6) in fp64 of two views that are alike: three dimensions vary less than gamma, three more."""
    x, noise = torch.randn(2, num, 6, dtype=torch.float64, generator=generator)
    scale = torch.tensor([0.1, 0.3, 0.2, 5.0, 7.0, 9.0], dtype=torch.float64)
    return x * scale, (x + 0.5 * noise) * scale


@pytest.mark.parametrize("num", [2, 9])
@pytest.mark.parametrize("gamma", [1.0, 0.2])
def test_the_loss_and_its_terms_are_the_papers_sums(num: int, gamma: float, generator: torch.Generator):
    z1, z2 = two_views(num, generator)
    loss, metrics = vicreg(z1, z2, *WEIGHTS, gamma)
    expected = by_sums(z1.tolist(), z2.tolist(), gamma)
    assert loss.item() == pytest.approx(weighted(expected), rel=1e-12)
    found = [metrics[name].item() for name in ("invariance", "variance", "covariance")]
    assert found == pytest.approx(list(expected), rel=1e-6)


def oracle(weights: Weights, z1: Tensor, z2: Tensor) -> Tensor:
    return weighted(by_sums(list(z1), list(z2)), weights)


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize(("world_size", "num"), [(1, 6), (2, 6), (3, 3), pytest.param(3, 6, marks=pytest.mark.slow)])
def test_ranks_give_the_full_batch_loss_and_gradient(
    world_size: int, num: int, weights: Weights, ranks: full_batch.RunOnRanks, generator: torch.Generator
):
    loss = partial(vicreg, **dict(zip(NAMES, weights, strict=True)))
    weight = torch.eye(6, dtype=torch.float64)  # keeps some dimensions below gamma
    weight += 0.02 * torch.randn(6, 6, dtype=torch.float64, generator=generator)
    inputs, bugs = two_views(num, generator), ["sum_over_ranks_grad"]
    full_batch.check(ranks, world_size, loss, partial(oracle, weights), inputs, weight, bugs=bugs)


def make(**options: Any) -> method_file.Method:
    return method_file.Config(**{"hidden_dim": 24, "projection_dim": 12, **options}).build(tiny.identity())


def test_the_expander_is_the_papers():
    """Linear, BN, ReLU, twice, then a linear layer; none has a bias (2105.04906, 4.2 and its code)."""
    layers = list(make().expander)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert tiny.linear_widths(make().expander) == [(16, 24), (24, 24), (24, 12)]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Linear))


def test_the_method_weighs_the_terms_and_tells_how_it_goes(generator: torch.Generator):
    z1, z2 = torch.randn(2, 64, 12, generator=generator)
    method = make(**dict(zip(NAMES, WEIGHTS, strict=True)), gamma=1.5)
    step = method.loss(Embedded((z1, z2)))
    assert step.loss.item() == pytest.approx(weighted(by_sums(z1.tolist(), z2.tolist(), 1.5)), rel=1e-4)
    assert step.metrics.keys() == {"invariance", "variance", "covariance", "std"}
    assert step.metrics["std"] == pytest.approx(1, abs=0.2)
    collapsed = method.loss(Embedded((z1[:1].expand(64, 12),) * 2)).metrics
    assert collapsed["std"] < 1e-3
    assert collapsed["variance"] == pytest.approx(1.5 - 0.01, abs=1e-3)
    assert collapsed["invariance"] == 0
