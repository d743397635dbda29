"""LiDAR, alpha-ReQ, RankMe and uniformity against scipy and numpy in fp64; alignment too, and what collapse gives."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
import torch
from torch import Tensor

from sslx.probe import geometry


def decaying(num: int, dim: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Features (num, dim), rotated, whose variances decay as i^-alpha exactly."""
    left = torch.linalg.qr(torch.randn(num, dim, dtype=torch.float64, generator=generator)).Q
    left = torch.linalg.qr(left - left.mean(0)).Q  # centered columns, of which a mean would change the variances
    right = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    return left * torch.arange(1, dim + 1) ** (-alpha / 2) @ right + torch.randn(dim, generator=generator)


@pytest.mark.parametrize(("num_images", "num_views", "dim"), [(60, 4, 9), (10, 6, 12)])
def test_lidar_is_that_of_the_generalized_eigenvalues(
    num_images: int, num_views: int, dim: int, generator: torch.Generator
) -> None:
    """With more images than features, and with fewer."""
    scale = torch.rand(dim, generator=generator) + 0.1
    x = torch.randn(num_images, 1, dim, generator=generator) * scale
    x = x + 0.7 * torch.randn(num_images, num_views, dim, generator=generator)
    views = x.double().numpy()
    means = views.mean(1)
    between = np.cov(means.T, bias=True)
    flat = (views - means[:, None]).reshape(-1, dim)
    within = flat.T @ flat / len(flat)
    within += 1e-4 * np.trace(within) / dim * np.eye(dim)
    values = scipy.linalg.eigh(between, within, eigvals_only=True).clip(0)
    shares = values / values.sum() + 1e-7
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert 1.2 < expected < min(dim, num_images)
    assert float(geometry.lidar(x)) == pytest.approx(expected, rel=1e-4)
    assert float(geometry.lidar(1e3 * x)) == pytest.approx(expected, rel=1e-4), "the scale does not matter"


def test_lidar_counts_directions_that_tell_images_apart(generator: torch.Generator) -> None:
    """Three directions differ between images, and five only between views of an image."""
    apart = torch.cat([torch.randn(500, 1, 3, generator=generator), torch.zeros(500, 1, 5)], 2)
    views = torch.cat([torch.zeros(500, 10, 3), torch.randn(500, 10, 5, generator=generator)], 2)
    noise = 1e-3 * torch.randn(500, 10, 8, generator=generator)
    assert float(geometry.lidar(apart + views + noise)) == pytest.approx(3, abs=0.05)
    assert float(geometry.rank_me((apart + views).flatten(0, 1))) > 7
    assert float(geometry.lidar(torch.ones(20, 3, 4))) == pytest.approx(1, abs=1e-4), "a collapse"


@pytest.mark.parametrize(("num", "dim"), [(300, 150), (80, 120), (50, 9)])
def test_alpha_req_is_the_weighted_fit_of_numpy(num: int, dim: int, generator: torch.Generator) -> None:
    x = torch.randn(num, dim, generator=generator) * torch.rand(dim, generator=generator)
    centered = x.double().numpy() - x.double().numpy().mean(0)
    variances = np.linalg.svd(centered, compute_uv=False)[: min(dim, num - 1)][3:100] ** 2
    i = np.arange(4, 4 + len(variances))
    slope, _ = np.polyfit(np.log(i), np.log(variances), 1, w=i**-0.5)  # of numpy, the weights of residuals, not squares
    assert float(geometry.alpha_req(x)) == pytest.approx(-slope, rel=1e-5)


def test_alpha_req_is_that_of_a_power_law_and_nan_where_there_is_none(generator: torch.Generator) -> None:
    for alpha in (0.5, 1.0, 2.5):
        assert float(geometry.alpha_req(decaying(200, 64, alpha, generator))) == pytest.approx(alpha, rel=1e-6)
    x = decaying(200, 64, 1.0, generator)
    dead = torch.cat([x, torch.full((200, 10), 3.5)], 1)
    assert float(geometry.alpha_req(dead)) == pytest.approx(1.0, rel=1e-6), "constant channels do not count"
    for none in (torch.ones(20, 30), x[:, :4], torch.full((20, 30), torch.nan)):
        assert geometry.alpha_req(none).isnan()


def test_rank_alignment_and_uniformity_are_those_of_scipy(generator: torch.Generator) -> None:
    x, y = (torch.randn(90, 14, dtype=torch.float64, generator=generator) for _ in range(2))
    singular = scipy.linalg.svdvals(x.numpy())
    rank = math.exp(scipy.stats.entropy(singular))
    assert float(geometry.rank_me(x)) == pytest.approx(rank, rel=1e-4)
    unit_x, unit_y = (v.numpy() / np.linalg.norm(v.numpy(), axis=1, keepdims=True) for v in (x, y))
    squared = scipy.spatial.distance.pdist(unit_x, "sqeuclidean")
    assert float(geometry.uniformity(x)) == pytest.approx(np.log(np.exp(-2 * squared).mean()), rel=1e-10)
    assert float(geometry.alignment(x, y)) == pytest.approx(((unit_x - unit_y) ** 2).sum(1).mean(), rel=1e-10)
