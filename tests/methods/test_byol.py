"""BYOL: its heads, and its loss by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from kit import tiny
from sslx.methods import byol
from sslx.methods.base import Embedded


def make(generator: torch.Generator, **options: Any) -> byol.Method:
    """In fp64, with a target that is no longer the online network."""
    method = tiny.build(byol.Config(**{"hidden_dim": 24, "projection_dim": 12, **options})).double()
    tiny.move_randomly(method.target.parameters(), generator)
    return method


def test_projector_and_predictor_have_no_norm_at_the_end(generator: torch.Generator):
    method = make(generator)
    for head, before in ((method.projector, 16), (method.predictor, 12)):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert tiny.linear_widths(head) == [(before, 24), (24, 12)]


def by_hand(p: list[list[float]], t: list[list[float]]) -> tuple[float, float]:
    """(squared distance of the normalised vectors, cosine), mean over samples: equation 2's left side."""
    distance = cosine = 0.0
    for a, b in zip(p, t, strict=True):
        a, b = ([x / math.sqrt(sum(y * y for y in v)) for x in v] for v in (a, b))
        distance += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(p)
        cosine += sum(x * y for x, y in zip(a, b, strict=True)) / len(p)
    return distance, cosine


def test_the_loss_is_the_squared_distance_in_both_directions(generator: torch.Generator):
    p1, p2, t1, t2 = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    step = tiny.at(make(generator), 0.5).loss(Embedded((p1, p2), (t1, t2)))
    (there, cosine), (back, other) = by_hand(p1.tolist(), t2.tolist()), by_hand(p2.tolist(), t1.tolist())
    assert step.loss.item() == pytest.approx(there + back, rel=1e-12)
    assert step.metrics["alignment"].item() == pytest.approx((cosine + other) / 2, abs=1e-6)
    assert step.metrics["target_momentum"].item() == pytest.approx(0.998)


def test_std_is_one_on_the_whole_sphere_and_zero_where_all_are_alike(generator: torch.Generator):
    method = make(generator)
    p, t = torch.randn(2, 512, 64, generator=generator)
    assert method.loss(Embedded((p, p), (t, t))).metrics["std"] == pytest.approx(1, abs=0.05)
    same = t[:1].expand_as(t)
    assert method.loss(Embedded((p, p), (same, same))).metrics["std"] < 1e-3
