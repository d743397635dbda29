"""BYOL: its views, its loss by hand, and a target that follows the online network and gets no gradient."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslx import encoders, optim, rng
from sslx.data.batch import Batch
from sslx.data.views import Augment
from sslx.errors import ConfigError
from sslx.methods import byol, ema

SIZE = 16


def make(generator: torch.Generator, **options: Any) -> byol.Method:
    """In fp64, with a target that is no longer the online network."""
    rng.seed_torch(0)
    trunk = encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
    config = byol.Config(**{"hidden_dim": 24, "projection_dim": 12, **options})
    method = byol.Method(config, encoders.build(trunk, SIZE)).double()
    for parameter in method.target.parameters():
        parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 10
    return method


def online(method: byol.Method) -> Iterator[nn.Parameter]:
    return chain(method.encoder.parameters(), method.projector.parameters())


def batch(generator: torch.Generator, size: int = 6) -> Batch:
    views = torch.randn(2, size, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return Batch(tuple(views), None, torch.arange(size))


def now(progress: float) -> Tensor:
    return torch.tensor(progress, dtype=torch.float64)


def test_the_numbers_are_the_papers():
    """Table 6 for the views, 3.2 and appendix B for the rest."""
    first, second = byol.views(byol.Config(), Augment(blur=1.0, min_scale=0.2), 32)
    assert (first.size, first.augment) == (32, Augment(blur=1.0, min_scale=0.2))
    assert (second.size, second.augment) == (32, Augment(blur=0.1, solarize=0.2, min_scale=0.2))
    assert byol.Config() == byol.Config(target_momentum=0.996, hidden_dim=4096, projection_dim=256)


def test_projector_and_predictor_have_no_norm_at_the_end(generator: torch.Generator):
    method = make(generator)
    for head, before in ((method.projector, 16), (method.predictor, 12)):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [p.shape for p in head.parameters() if p.ndim == 2] == [(24, before), (12, 24)]


def test_the_target_starts_as_the_online_network():
    trunk = encoders.build(encoders.Config(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16)), SIZE)
    method = byol.Method(byol.Config(hidden_dim=24, projection_dim=12), trunk)
    target = list(method.target.parameters())
    torch.testing.assert_close([p.data for p in target], [p.data for p in online(method)], rtol=0, atol=0)
    assert not {p.data_ptr() for p in target} & {p.data_ptr() for p in online(method)}


def test_predictions_are_of_the_online_network_and_targets_of_the_other(generator: torch.Generator):
    method, images = make(generator), batch(generator)
    method.eval()  # by running statistics, so that a view alone gives what it gives beside the other
    p1, p2, t1, t2 = method.embed(images)
    for view, p, t in zip(images.views, (p1, p2), (t1, t2), strict=True):
        torch.testing.assert_close(p, method.predictor(method.projector(method.encoder(view))))
        torch.testing.assert_close(t, method.target[1](method.target[0](view)))
        assert (method.projector(method.encoder(view)) - t).abs().max() > 1e-3
        assert p.requires_grad
        assert not t.requires_grad


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
    step = make(generator).loss((p1, p2, t1, t2), now(0.5))
    (there, cosine), (back, other) = by_hand(p1.tolist(), t2.tolist()), by_hand(p2.tolist(), t1.tolist())
    assert step.loss.item() == pytest.approx(there + back, rel=1e-12)
    assert step.metrics["alignment"].item() == pytest.approx((cosine + other) / 2, abs=1e-6)
    assert step.metrics["target_momentum"].item() == pytest.approx(0.998)


def test_std_is_one_on_the_whole_sphere_and_zero_where_all_are_alike(generator: torch.Generator):
    method = make(generator)
    p, t = torch.randn(2, 512, 64, generator=generator)
    assert method.loss((p, p, t, t), now(0)).metrics["std"] == pytest.approx(1, abs=0.05)
    same = t[:1].expand_as(t)
    assert method.loss((p, p, same, same), now(0)).metrics["std"] < 1e-3


def test_no_gradient_reaches_the_target(generator: torch.Generator):
    method = make(generator)
    method(batch(generator), now(0)).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    trained = [*online(method), *method.predictor.parameters()]
    assert all(p.grad is not None for p in trained)
    assert trained[0].grad is not None
    assert trained[0].grad.abs().sum() > 0
    leaves = torch.randn(4, 3, 5, generator=generator).requires_grad_().unbind()  # as gradient caching makes them
    gradients = torch.autograd.grad(method.loss(leaves, now(0)).loss, leaves, allow_unused=True)
    assert [g is None for g in gradients] == [False, False, True, True]


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_the_optimizer_leaves_the_target_out(name: Any, generator: torch.Generator):
    method = make(generator)
    optimizer = optim.build(optim.Config(name=name), method)
    found = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(p) for p in [*online(method), *method.predictor.parameters()]}


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.996), (0.5, 0.998), (1.0, 1.0)])
def test_the_momentum_rises_to_one(progress: float, expected: float):
    assert ema.cosine_momentum(0.996, now(progress)).item() == pytest.approx(expected, abs=1e-12)
    assert ema.cosine_momentum(0.996, torch.tensor(progress)).item() == pytest.approx(expected, abs=1e-7)


def test_the_target_moves_by_the_momentum_and_its_statistics_are_its_own(generator: torch.Generator):
    method = make(generator, target_momentum=0.9)
    method.embed(batch(generator))
    progress = torch.rand((), generator=generator, dtype=torch.float64)
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * progress.item()) + 1) / 2
    old, buffers = ([x.detach().clone() for x in tensors()] for tensors in (method.target.parameters, method.buffers))
    followed = [p.detach().clone() for p in online(method)]
    method.after_step(progress)
    for new, before, ahead, leader in zip(method.target.parameters(), old, followed, online(method), strict=True):
        expected = momentum * before.numpy() + (1 - momentum) * ahead.numpy()
        torch.testing.assert_close(new.data, torch.from_numpy(expected), rtol=0, atol=1e-14)
        assert torch.equal(leader, ahead)
    assert all(torch.equal(a, b) for a, b in zip(method.buffers(), buffers, strict=True))
    counts = [int(b) for n, b in method.target.named_buffers() if n.endswith("num_batches_tracked")]
    assert set(counts) == {1}
    assert not torch.equal(method.target[1][1].running_mean, method.projector[1].running_mean)
    still = [p.detach().clone() for p in method.target.parameters()]
    method.after_step(now(1))
    assert all(torch.equal(a, b) for a, b in zip(method.target.parameters(), still, strict=True))


def test_probes_read_the_online_encoder(generator: torch.Generator):
    """They take a checkpoint's keys that begin with ``encoder.``."""
    method = make(generator)
    found = {key for key in method.state_dict() if key.startswith("encoder.")}
    assert found == {f"encoder.{key}" for key in method.encoder.state_dict()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_momentum": -0.1},
        {"target_momentum": 1.1},
        {"target_momentum": math.nan},
        {"hidden_dim": 0},
        {"projection_dim": 0},
        {"second_blur": 1.5},
        {"second_solarize": -0.1},
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match="byol needs"):
        byol.Config(**wrong)
