"""MoCo v3: its heads, InfoNCE against loops at any world size, a frozen patch projection, and its momentum encoder."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslx import distributed, encoders, optim, rng
from sslx.data.batch import Batch
from sslx.data.views import Augment
from sslx.errors import ConfigError, DataError
from sslx.losses import info_nce
from sslx.methods import mocov3

RunOnRanks = Callable[..., list[Any]]
SIZE, TAU = 16, 0.2
RESNET = encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
VIT = encoders.Config(name="vit_tiny_patch16_224", patch=4, layers=(2,), channels=(16,))


def make(trunk: encoders.Config = RESNET, **options: Any) -> mocov3.Method:
    """In fp64."""
    rng.seed_torch(0)
    numbers: dict[str, Any] = {"hidden_dim": 24, "projection_dim": 12, **options}
    return mocov3.Method(mocov3.Config(**numbers), encoders.build(trunk, SIZE)).double()


def batch(generator: torch.Generator, size: int = 6) -> Batch:
    views = torch.randn(2, size, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return Batch(tuple(views), None, torch.arange(size))


def now(progress: float) -> Tensor:
    return torch.tensor(progress, dtype=torch.float64)


def test_the_numbers_are_the_papers():
    """4.1 and 4.2, and algorithm 1; the views are BYOL's (2006.07733, table 6)."""
    config = mocov3.Config()
    assert config == mocov3.Config(temperature=0.2, momentum=0.99, hidden_dim=4096, projection_dim=256)
    assert config.freeze_patches
    first, second = mocov3.views(config, Augment(blur=1.0, min_scale=0.2), 32)
    assert (first.size, first.augment) == (32, Augment(blur=1.0, min_scale=0.2))
    assert (second.size, second.augment) == (32, Augment(blur=0.1, solarize=0.2, min_scale=0.2))


@pytest.mark.parametrize(("trunk", "layers", "last_norm"), [(RESNET, 2, False), (VIT, 3, True)])
def test_the_heads_are_the_codes(trunk: encoders.Config, layers: int, last_norm: bool):
    method = make(trunk)
    hidden, last = [nn.Linear, nn.BatchNorm1d, nn.ReLU], [nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in method.projector] == [*hidden * (layers - 1), *last]
    assert [type(layer) for layer in method.predictor] == [*hidden, *(last if last_norm else last[:1])]
    for head, widths in ((method.projector, [16, *[24] * (layers - 1), 12]), (method.predictor, [12, 24, 12])):
        linear = [layer for layer in head if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linear] == list(pairwise(widths))
        assert all(layer.bias is None for layer in linear)
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


def share_of(x: Tensor, k: Tensor, weight: Tensor, planted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over ranks of loss, accuracy and a linear encoder's gradient, each rank having its share of the batch."""
    world_size, rank = distributed.world_size(), distributed.rank()
    leaf = weight.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if planted:  # a bug: every rank takes the first rank's keys for its positives
            patch.setattr(distributed, "rank", lambda _=None: 0)
        loss, metrics = info_nce(x.chunk(world_size)[rank] @ leaf, k.chunk(world_size)[rank] @ leaf, TAU)
    (gradient,) = torch.autograd.grad(loss, leaf)
    found = loss.detach(), metrics["contrast_accuracy"], gradient
    return tuple(distributed.mean_over_ranks(value) for value in found)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("world_size", "num"), [(1, 6), (2, 6), pytest.param(3, 6, marks=pytest.mark.slow)])
def test_ranks_give_the_full_batch_loss_and_gradient(
    world_size: int, num: int, ranks: RunOnRanks, generator: torch.Generator
):
    (x, k), weight = pairs(num, generator), torch.randn(6, 4, dtype=torch.float64, generator=generator)
    leaf = weight.clone().requires_grad_()
    full, accuracy = by_loops(x @ leaf, k @ weight, TAU)
    (expected,) = torch.autograd.grad(full, leaf)
    for planted in [False] if world_size == 1 else [False, True]:
        for loss, share, gradient in ranks(world_size, share_of, x, k, weight, planted):
            error = (gradient - expected).norm() / expected.norm()
            assert error > 1e-2 if planted else error < 1e-10
            if not planted:
                assert loss.item() == pytest.approx(full.item(), rel=1e-10)
                assert share.item() == pytest.approx(accuracy)


def test_info_nce_is_in_fp32_in_autocast_too(generator: torch.Generator):
    """At a low temperature bf16 similarities would leave no digits."""
    q, k = (x.bfloat16() for x in pairs(32, generator))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = info_nce(q, k, 0.01)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loops(q.double(), k.double(), 0.01)[0].item(), rel=1e-4)


def with_unequal_batches() -> str:
    z = torch.ones(3 + distributed.rank(), 2)
    with pytest.raises(DataError) as raised:
        info_nce(z, z)
    return str(raised.value)


def test_unequal_batches_are_an_error_on_all_ranks(ranks: RunOnRanks):
    for message in ranks(2, with_unequal_batches):
        assert "batch size of InfoNCE on every rank, got [3, 4]" in message
        assert "\n" not in message


def test_what_does_not_fit_is_said_in_one_line():
    z = torch.ones(1, 4)
    with pytest.raises(ConfigError, match=r"^InfoNCE has no negatives: expected 2 samples or more, got 1$"):
        info_nce(z, z)
    with pytest.raises(ValueError, match=r"\(4, 3\), \(4, 2\)"):
        info_nce(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"floats, got torch.int64"):
        info_nce(torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3))
    with pytest.raises(ValueError, match="above 0, got 0"):
        info_nce(torch.ones(4, 3), torch.ones(4, 3), 0)


def test_the_loss_is_two_tau_info_nce_in_both_directions(generator: torch.Generator):
    q1, q2, k1, k2 = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    step = make(temperature=0.3).loss((q1, q2, k1, k2), now(0.5))
    (there, found), (back, also) = by_loops(q1, k2, 0.3), by_loops(q2, k1, 0.3)
    assert step.loss.item() == pytest.approx(2 * 0.3 * (there + back).item(), rel=1e-12)
    assert step.metrics["contrast_accuracy"].item() == pytest.approx((found + also) / 2)
    assert step.metrics["momentum"].item() == pytest.approx(0.995)
    cosines = [(q @ k) / (q.norm() * k.norm()) for q, k in zip([*q1, *q2], [*k2, *k1], strict=True)]
    assert step.metrics["alignment"].item() == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)


def test_metrics_tell_a_collapse_from_a_perfect_match(generator: torch.Generator):
    z = torch.randn(64, 32, generator=generator)
    perfect = make().loss((z, z, z, z), now(0)).metrics
    same = z[:1].expand_as(z)
    collapsed = make().loss((same, same, same, same), now(0)).metrics
    assert [perfect["contrast_accuracy"], perfect["alignment"]] == pytest.approx([1, 1], abs=1e-6)
    assert perfect["std"] == pytest.approx(1, abs=0.1)
    assert collapsed["std"] < 1e-3
    assert collapsed["contrast_accuracy"] < 0.1


def test_queries_are_of_the_online_network_and_keys_of_the_momentum_one(generator: torch.Generator):
    method, images = make(), batch(generator)
    for parameter in method.target.parameters():
        parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 10
    method.eval()  # by running statistics, so that a view alone gives what it gives beside the other
    q1, q2, k1, k2 = method.embed(images)
    for view, q, k in zip(images.views, (q1, q2), (k1, k2), strict=True):
        torch.testing.assert_close(q, method.predictor(method.projector(method.encoder(view))))
        torch.testing.assert_close(k, method.target[1](method.target[0](view)))
        assert (method.projector(method.encoder(view)) - k).abs().max() > 1e-3
        assert (q.requires_grad, k.requires_grad) == (True, False)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_vits_patch_projection_keeps_its_weights_if_so_asked(freeze: bool, generator: torch.Generator):
    method = make(VIT, freeze_patches=freeze)
    optimizer = optim.build(optim.Config(name="adamw", lr=0.01), method)
    before = {name: p.detach().clone() for name, p in method.encoder.named_parameters()}
    method(batch(generator), now(0)).loss.backward()
    optimizer.step()
    frozen = {name for name, p in method.encoder.named_parameters() if torch.equal(p, before[name])}
    assert frozen == ({"trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.bias"} if freeze else set())


def test_the_momentum_network_follows_the_online_one_and_gets_no_gradient(generator: torch.Generator):
    method = make(momentum=0.9)
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    target = list(method.target.parameters())
    assert all(torch.equal(p, q) for p, q in zip(target, online, strict=True))
    optimizer = optim.build(optim.Config(name="sgd", lr=0.1), method)
    method(batch(generator), now(0)).loss.backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in target)
    assert all(p.grad is not None for p in [*online, *method.predictor.parameters()])
    progress = torch.rand((), generator=generator, dtype=torch.float64)
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * progress.item()) + 1) / 2
    before = [p.clone() for p in target]
    method.after_step(progress)
    for new, old, ahead in zip(target, before, online, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * ahead.detach(), rtol=0, atol=1e-14)
    assert any((new - old).abs().max() > 1e-6 for new, old in zip(target, before, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"momentum": 1.1},
        {"momentum": -0.1},
        {"hidden_dim": 0},
        {"projection_dim": 0},
        {"second_blur": 1.5},
        {"second_solarize": -0.1},
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match="mocov3 needs"):
        mocov3.Config(**wrong)
