"""MoCo v3: its heads, InfoNCE against loops at any world size, and a frozen patch projection."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import full_batch, tiny
from sslx import encoders, optim
from sslx.losses import info_nce
from sslx.methods import mocov3
from sslx.methods.base import Embedded

TAU = 0.2


def make(trunk: encoders.Config = tiny.RESNET, **options: Any) -> mocov3.Method:
    """In fp64."""
    return tiny.build(mocov3.Config(**{"hidden_dim": 24, "projection_dim": 12, **options}), trunk).double()


@pytest.mark.parametrize(("trunk", "layers", "last_norm"), [(tiny.RESNET, 2, False), (tiny.VIT, 3, True)])
def test_the_heads_are_the_codes(trunk: encoders.Config, layers: int, last_norm: bool):
    method = make(trunk)
    hidden, last = [nn.Linear, nn.BatchNorm1d, nn.ReLU], [nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in method.projector] == [*hidden * (layers - 1), *last]
    assert [type(layer) for layer in method.predictor] == [*hidden, *(last if last_norm else last[:1])]
    for head, widths in ((method.projector, [16, *[24] * (layers - 1), 12]), (method.predictor, [12, 24, 12])):
        assert tiny.linear_widths(head) == list(pairwise(widths))
        assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    norms = [head[-1] for head in (method.projector, method.predictor) if isinstance(head[-1], nn.BatchNorm1d)]
    assert not any(norm.affine for norm in norms)
    assert len(norms) == 1 + last_norm


def by_loops(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, float]:
    """(equation 1, mean over queries; share of queries whose key is the nearest), pair by pair."""
    terms: list[Tensor] = []
    right = 0
    for i, query in enumerate(q):
        cosines = [(query @ key) / (query.square().sum() * key.square().sum()).sqrt() for key in k]
        exponentials = [(cosine / temperature).exp() for cosine in cosines]
        terms.append(-torch.log(exponentials[i] / sum(exponentials)))
        right += all(cosines[i] >= other for other in cosines)
    return torch.stack(terms).mean(), right / len(q)


def pairs(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (num, 6) in fp64 of queries and keys that are alike, but not so that all find each other."""
    x, noise = torch.randn(2, num, 6, dtype=torch.float64, generator=generator)
    return x, x + noise


@pytest.mark.parametrize("num", [2, 9])
def test_info_nce_is_the_papers_and_keys_get_no_gradient(num: int, generator: torch.Generator):
    q, k = (x.requires_grad_() for x in pairs(num, generator))
    loss, metrics = info_nce(q, k, TAU)
    expected, accuracy = by_loops(q, k.detach(), TAU)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["contrast_accuracy"].item() == pytest.approx(accuracy)
    gradient, none = torch.autograd.grad(loss, (q, k), allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, q)[0], rtol=1e-10, atol=1e-12)
    assert none is None


def loss_of(q: Tensor, k: Tensor) -> Tensor:
    return by_loops(q, k.detach(), TAU)[0]


@pytest.mark.parametrize(("world_size", "num"), [(1, 6), (2, 6), pytest.param(3, 6, marks=pytest.mark.slow)])
def test_ranks_give_the_full_batch_loss_and_gradient(
    world_size: int, num: int, ranks: full_batch.RunOnRanks, generator: torch.Generator
):
    """A rank that takes the first rank's keys for its positives would be found."""
    weight = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    full_batch.check(ranks, world_size, info_nce, loss_of, pairs(num, generator), weight, bugs=["rank"])


def test_the_loss_is_two_tau_info_nce_in_both_directions(generator: torch.Generator):
    q1, q2, k1, k2 = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    step = tiny.at(make(temperature=0.3), 0.5).loss(Embedded((q1, q2), (k1, k2)))
    (loss_1, share_1), (loss_2, share_2) = by_loops(q1, k2, 0.3), by_loops(q2, k1, 0.3)
    assert step.loss.item() == pytest.approx(2 * 0.3 * (loss_1 + loss_2).item(), rel=1e-12)
    assert step.metrics["contrast_accuracy"].item() == pytest.approx((share_1 + share_2) / 2)
    assert step.metrics["momentum"].item() == pytest.approx(0.995)
    cosines = [(q @ k) / (q.norm() * k.norm()) for q, k in zip([*q1, *q2], [*k2, *k1], strict=True)]
    assert step.metrics["alignment"].item() == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)


def test_metrics_tell_a_collapse_from_a_perfect_match(generator: torch.Generator):
    z = torch.randn(64, 32, generator=generator)
    perfect = make().loss(Embedded((z, z), (z, z))).metrics
    same = z[:1].expand_as(z)
    collapsed = make().loss(Embedded((same, same), (same, same))).metrics
    assert [perfect["contrast_accuracy"], perfect["alignment"]] == pytest.approx([1, 1], abs=1e-6)
    assert perfect["std"] == pytest.approx(1, abs=0.1)
    assert collapsed["std"] < 1e-3
    assert collapsed["contrast_accuracy"] < 0.1


@pytest.mark.parametrize("freeze", [True, False])
def test_a_vits_patch_projection_keeps_its_weights_if_so_asked(freeze: bool, generator: torch.Generator):
    method = make(tiny.VIT, freeze_patches=freeze)
    optimizer = optim.build(optim.Config(name="adamw", lr=0.01), method)
    before = {name: p.detach().clone() for name, p in method.encoder.named_parameters()}
    method(tiny.batch(method, generator)).loss.backward()
    optimizer.step()
    frozen = {name for name, p in method.encoder.named_parameters() if torch.equal(p, before[name])}
    assert frozen == ({"trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias"} if freeze else set())
