"""SimSiam: its heads, its loss by hand, and the collapse that its stop-gradient prevents."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from sslx import encoders
from sslx.data.batch import Batch
from sslx.methods import simsiam
from sslx.methods.base import Embedded


def make(**options: Any) -> simsiam.Method:
    """On the smallest encoder that a loss can act on, of images of 4 px."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
    config = simsiam.Config(**{"hidden_dim": 32, "projection_dim": 24, "bottleneck_dim": 8, **options})
    return config.build(encoders.Encoder(layers, 16, encoders.Recipe(name="layers", size=4)))


def test_the_heads_are_the_papers():
    """Three layers, each with BN, the last one's without weights; a predictor without BN at its end."""
    method = make()
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in method.projector] == [*block, *block, nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in method.predictor] == [*block, nn.Linear]
    shapes = [tuple(p.shape) for head in (method.projector, method.predictor) for p in head.parameters()]
    assert shapes == [(32, 16), (32,), (32,), (32, 32), (32,), (32,), (24, 32), (8, 24), (8,), (8,), (24, 8), (24,)]


def test_views_come_out_in_order(generator: torch.Generator):
    method = make().double().eval()  # by running statistics, so that a view alone gives what it gives beside the other
    one, two = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    for view, p, z in zip((one, two), *method.embed(Batch((one, two), None, torch.arange(5))), strict=True):
        alone = method.projector(method.encoder(view))
        torch.testing.assert_close(z, alone)
        torch.testing.assert_close(p, method.predictor(alone))


def by_hand(p: list[list[float]], z: list[list[float]]) -> float:
    """Equation 1, mean over samples."""
    total = 0.0
    for a, b in zip(p, z, strict=True):
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        total -= sum(x * y for x, y in zip(a, b, strict=True)) / norms
    return total / len(p)


def test_the_loss_is_half_of_each_direction(generator: torch.Generator):
    p1, p2, z1, z2 = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    expected = by_hand(p1.tolist(), z2.tolist()) / 2 + by_hand(p2.tolist(), z1.tolist()) / 2
    for embedded in (Embedded((p1, p2), (z1, z2)), Embedded((p1, p2, z1, z2))):
        step = make().loss(embedded)
        assert step.loss.item() == pytest.approx(expected, rel=1e-12)
        assert step.metrics["alignment"].item() == pytest.approx(-expected, abs=1e-6)


def test_std_is_one_on_the_whole_sphere_and_zero_where_all_are_alike(generator: torch.Generator):
    p, z = torch.randn(2, 512, 64, generator=generator)
    assert make().loss(Embedded((p, p), (z, z))).metrics["std"] == pytest.approx(1, abs=0.05)
    same = z[:1].expand_as(z)
    assert make().loss(Embedded((p, p), (same, same))).metrics["std"] < 1e-3


@pytest.mark.parametrize("stop", [True, False])
def test_projections_get_a_gradient_through_the_predictor_only(stop: bool, generator: torch.Generator):
    method = make(stop_gradient=stop)
    embedded = method.embed(Batch(torch.randn(2, 5, 3, 4, 4, generator=generator).unbind(), None, torch.arange(5)))
    assert [len(embedded.compared), len(embedded.given)] == ([2, 2] if stop else [4, 0])
    assert all(z.requires_grad for z in embedded.compared)
    assert not any(z.requires_grad for z in embedded.given)


def trained(seed: int, noise: float, *, last_norm: bool = True, stop_gradient: bool = True) -> tuple[float, float]:
    """(std, effective rank of the projections) after 200 steps on 32 images, whose views are the image and noise."""
    torch.manual_seed(seed)
    method = make(stop_gradient=stop_gradient)
    if not last_norm:
        method.projector[-1] = nn.Identity()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(32, 3, 4, 4, generator=generator)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    std, z = torch.zeros(()), torch.zeros(())
    for _ in range(200):
        views = [images + noise * torch.randn(images.shape, generator=generator) for _ in range(2)]
        embedded = method.embed(Batch(tuple(views), None, torch.arange(32)))
        step, z = method.loss(embedded), (*embedded.compared, *embedded.given)[2]
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        std = step.metrics["std"]
    share = torch.linalg.svdvals(z.detach() - z.detach().mean(0))
    share /= share.sum()
    return std.item(), math.exp(-(share * share.clamp(min=1e-12).log()).sum().item())


@pytest.mark.parametrize("seed", [1, 2])  # of chaotic training: how near another one comes to the limits, none can say
def test_only_with_the_stop_gradient_projections_stay_apart(seed: int):
    """Figure 2, without the projector's last norm (table 3b: as good), which would hold its outputs apart."""
    assert trained(seed, 1.0, last_norm=False)[0] > 0.6
    assert trained(seed, 1.0, last_norm=False, stop_gradient=False)[0] < 0.2


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.slow
def test_with_all_norms_it_is_their_rank_that_collapses(seed: int):
    """Then no projection can be constant, and what is left is one direction."""
    assert trained(seed, 4.0)[1] > 6
    assert trained(seed, 4.0, stop_gradient=False)[1] < 4
