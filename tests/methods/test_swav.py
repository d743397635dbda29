"""SwAV: its views, its loss by hand, its queue at any number of ranks, prototypes of length 1 that can be frozen."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import full_batch, tiny
from kit.full_batch import RunOnRanks
from sslx import distributed, encoders, losses, optim
from sslx.config import load
from sslx.encoders.group_norm import group_norm
from sslx.errors import ConfigError
from sslx.methods import swav
from sslx.methods.base import Embedded
from sslx.train import verify
from sslx.train.step import cached_step, train_step

DIM, NUM_PROTOTYPES = 8, 7


def make(**options: Any) -> swav.Method:
    """In fp64, on an encoder that averages over quarters of a view, with prototypes that are not frozen."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    numbers: dict[str, Any] = {"num_local": 2, "num_prototypes": NUM_PROTOTYPES, "hidden_dim": 16}
    numbers |= {"projection_dim": DIM, "freeze_prototypes": 0.0, "queue_start": 0.0, **options}
    encoder = encoders.Encoder(trunk, 12, encoders.Recipe(name="trunk", size=16))
    method = swav.Config(**numbers).build(encoder).double()
    method.after_step()  # their lengths are 1 in fp32 only
    return method


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def embedded(method: swav.Method, z: Tensor) -> Embedded:
    """What ``embed`` gives for embeddings (V, B, D)."""
    return Embedded((z @ method.prototypes.weight.detach().T).unbind(), (z[0], z[1]))


def by_loops(scores: Sequence[Any], past: Any, temperature: float) -> tuple[Any, list[Any]]:
    """(equation 6 as a mean over pairs, the codes) of scores (V, B, K), with past ones (2, L, K) for the codes."""
    num_views, num = len(scores), len(scores[0])
    total, codes = 0.0, list[Any]()
    for i in range(2):
        rows = torch.cat([past[i], scores[i].detach()])
        codes.append(losses.sinkhorn(rows, 0.05, 3)[-num:].tolist())
        for v in set(range(num_views)) - {i}:
            for b in range(num):
                exps = [torch.exp(s / temperature) for s in scores[v][b]]
                for q, e in zip(codes[i][b], exps, strict=True):
                    total = total - q * torch.log(e / sum(exps)) / (2 * (num_views - 1) * num)
    return total, codes


def entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def test_scores_are_cosines_of_each_view_with_the_prototypes(generator: torch.Generator):
    method = make()
    assert [type(layer) for layer in method.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    images = tiny.batch(method, generator)
    method.eval()  # by running statistics, so that a view alone gives what it gives beside the others
    scores, (z1, z2) = method.embed(images)
    assert len(scores) == 4
    for view, z, score in zip(images.views, (z1, z2, None, None), scores, strict=True):
        alone = method.projector(method.encoder(view))
        cosine = nn.functional.cosine_similarity(alone[:, None], method.prototypes.weight[None], dim=2)
        torch.testing.assert_close(score, cosine, rtol=1e-10, atol=1e-14)
        assert score.requires_grad
        if z is not None:
            torch.testing.assert_close(z, nn.functional.normalize(alone, dim=1))
            assert not z.requires_grad


@pytest.mark.parametrize("num_views", [2, 5])
def test_the_loss_and_its_metrics_are_the_papers_sums(num_views: int, generator: torch.Generator):
    method, z = tiny.at(make(temperature=0.2), 1.0), unit(num_views, 6, DIM, generator=generator)
    scores, given = embedded(method, z)
    leaves = torch.stack(scores).requires_grad_()
    expected, codes = by_loops(leaves, leaves.new_zeros(2, 0, NUM_PROTOTYPES), 0.2)
    (gradient,) = torch.autograd.grad(expected, leaves)
    step = method.loss(Embedded(leaves.unbind(), given))
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(step.loss, leaves)[0], gradient, rtol=1e-10, atol=1e-14)
    rows = [(row / 0.2).softmax(0).tolist() for score in scores for row in score]
    mean = [sum(row[k] for row in rows) / len(rows) for k in range(NUM_PROTOTYPES)]
    code = sum(entropy(row) for each in codes for row in each) / 12
    assert step.metrics["prototype_entropy"].item() == pytest.approx(entropy(mean), rel=1e-6)
    assert step.metrics["code_entropy"].item() == pytest.approx(code, rel=1e-6)


def test_the_metrics_tell_collapse(generator: torch.Generator):
    method = tiny.at(make(), 1.0)
    z = method.prototypes.weight.detach()[:1].expand(4, 64, DIM)  # all at a prototype
    collapsed = method.loss(embedded(method, z)).metrics
    spread = method.loss(embedded(method, unit(4, 64, DIM, generator=generator))).metrics
    assert collapsed["projection_std"] < 1e-3
    assert collapsed["code_entropy"] == pytest.approx(1)  # one point: Sinkhorn-Knopp can only share it out
    assert collapsed["prototype_entropy"] < spread["prototype_entropy"] - 0.1
    assert spread["projection_std"] > 0.8


def loss_of(*views: Tensor) -> Tensor:
    """Of this rank's scores (V of them), given the embeddings of both global views."""
    return tiny.at(make(), 0.5).loss(Embedded(views[:-2], views[-2:])).loss


def oracle(*views: Tensor) -> Tensor:
    return by_loops(views[:-2], views[0].new_zeros(2, 0, NUM_PROTOTYPES), 0.1)[0]


@full_batch.over_ranks
def test_ranks_give_the_full_batch_loss_and_gradient(world_size: int, ranks: RunOnRanks, generator: torch.Generator):
    """Codes from a rank's own samples only would be found."""
    z, weight = unit(4, 6, DIM, generator=generator).unbind(), unit(NUM_PROTOTYPES, DIM, generator=generator).T
    full_batch.check(ranks, world_size, loss_of, oracle, z, weight, given=z[:2], bugs=["sum_over_ranks"])


def steps_on_a_rank(z: Tensor, weight: Tensor, queue_size: int) -> list[tuple[float, Tensor, Tensor]]:
    """Of z (steps, V, B, D) of all ranks, each step's mean loss and gradient over ranks, and the queue after it."""
    method, steps = tiny.at(make(queue_size=queue_size), 0.5), list[tuple[float, Tensor, Tensor]]()
    method.prototypes.weight.data = weight
    for each in z:
        own = each.chunk(distributed.world_size(), dim=1)[distributed.rank()]
        leaf = weight.clone().requires_grad_()
        loss = method.loss(Embedded((own @ leaf.T).unbind(), (own[0], own[1]))).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        means = distributed.mean_over_ranks(loss.detach()).item(), distributed.mean_over_ranks(gradient)
        steps.append((*means, method.queue.clone()))
    return steps


@full_batch.over_ranks
def test_the_queue_holds_all_ranks_samples_in_their_order_and_makes_the_codes_once_full(
    world_size: int, ranks: RunOnRanks, generator: torch.Generator
):
    z, weight = unit(5, 4, 6, DIM, generator=generator), unit(NUM_PROTOTYPES, DIM, generator=generator)
    past = weight.new_zeros(2, 0, DIM)
    found = ranks(world_size, steps_on_a_rank, z, weight, 18)
    for step, each in enumerate(z):
        leaf = weight.clone().requires_grad_()
        used = past if step >= 3 else past[:, :0]
        full, _ = by_loops(each @ leaf.T, used @ weight.T, 0.1)
        (expected,) = torch.autograd.grad(full, leaf)
        past = torch.cat([each[:2], past], dim=1)[:, :18]
        for of_rank in found:
            loss, gradient, queue = of_rank[step]
            assert loss == pytest.approx(full.item(), rel=1e-10)
            assert (gradient - expected).norm() < 1e-10 * expected.norm()
            torch.testing.assert_close(queue[:, : past.shape[1]], past, rtol=0, atol=0)
            assert not queue[:, past.shape[1] :].any()


@pytest.mark.parametrize(("num_full", "progress"), [(0, 1.0), (2, 1.0), (3, 0.2), (3, 0.5)])
def test_a_queue_that_is_not_full_or_not_yet_due_changes_nothing(
    num_full: int, progress: float, generator: torch.Generator
):
    """And one that is both does; full after 3 batches of 6, due from 0.5 on."""
    z, without = unit(4, 4, 6, DIM, generator=generator), make()
    method = make(queue_size=18, queue_start=0.5)
    for each in z[:num_full]:
        method.loss(embedded(method, each))
    with_queue, alone = (tiny.at(each, progress).loss(embedded(each, z[3])).loss for each in (method, without))
    assert torch.equal(with_queue, alone) == (num_full < 3 or progress < 0.5)


def test_the_queue_is_in_the_checkpoint(generator: torch.Generator):
    method = make(queue_size=6)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, fused=True)
    train_step(method, [tiny.batch(method, generator)], optimizer, 0.3, None)
    assert method.state_dict()["queue"].all()


def test_gradient_caching_gives_the_whole_batchs_step_and_fills_the_queue_once(generator: torch.Generator):
    whole, past = tiny.batch(make(), generator, 12), unit(2, 24, DIM, generator=generator)
    parts = [tiny.part(whole, slice(i, i + 6)) for i in (0, 6)]
    found = list[tuple[Tensor, ...]]()
    for step, batches in ((train_step, [whole]), (cached_step, parts)):
        method = make(queue_size=24)
        group_norm(method)  # batch norm would take its statistics from each part
        method.queue.copy_(past)
        metrics = step(method, batches, torch.optim.SGD(method.parameters(), lr=1e-30, fused=True), 0.5, None)
        gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
        found.append((metrics["loss"], torch.cat(gradients), method.queue.clone()))
    for cached, once in zip(*found, strict=True):
        torch.testing.assert_close(cached, once, rtol=1e-9, atol=1e-12)
    assert found[0][2][:, 12:].equal(past[:, :12])


@pytest.mark.parametrize(("size", "take"), [(100, "96 or 144"), (20, "48")])
def test_a_queue_of_no_whole_batches_is_refused_in_one_line(size: int, take: str):
    make(queue_size=96).config.check(48, tiny.UNLABELED)
    make(queue_size=0).config.check(48, tiny.UNLABELED)
    with pytest.raises(ConfigError, match=rf"^swav's queue [^\n]* of 48, got [^\n]* {size}: take {take}$"):
        make(queue_size=size).config.check(48, tiny.UNLABELED)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_prototypes_have_length_one_and_move_only_when_not_frozen(name: Any, generator: torch.Generator):
    method = make(freeze_prototypes=0.3)
    images = tiny.batch(method, generator)
    optimizer = optim.build(optim.Config(name=name, lr=0.1, weight_decay=0.1), method)
    weight = method.prototypes.weight
    one = torch.ones(NUM_PROTOTYPES, dtype=torch.float64)
    torch.testing.assert_close(weight.detach().norm(dim=1), one, rtol=0, atol=1e-14)
    for progress in (0.0, 0.1, 0.2, 0.3):
        before = weight.detach().clone()
        train_step(method, [images], optimizer, progress, None)
        torch.testing.assert_close(weight.detach().norm(dim=1), one, rtol=0, atol=1e-14)
        assert weight.grad is not None
        assert weight.grad.any() == (progress >= 0.3)
        moved = (weight - before).abs().max()
        assert moved > 1e-6 if progress >= 0.3 else moved < 1e-14  # weight decay's rounding


def trained(queue_start: float) -> verify.State:
    """What ``sslx verify`` compares, after four steps with a queue of two batches."""
    flags = ["--method.name", "swav", "--method.num-local", "2", "--method.num-prototypes", "30"]
    flags += ["--method.queue-size", str(2 * verify.BATCH_SIZE), "--method.queue-start", str(queue_start)]
    settings = load([*verify.SETTINGS, *verify.ENCODERS["resnet"], *flags, "--precision", "fp64"])
    settings = dataclasses.replace(settings, method=verify.narrow(settings.method))
    torch._C._set_mkldnn_enabled(False)  # as in test_equivalence
    return verify.train(settings, distributed.init("cpu"), 4)


@pytest.mark.slow
def test_ranks_train_as_one_with_a_queue_in_use(ranks: RunOnRanks):
    (one,), (unused,) = (ranks(1, trained, start, timeout_s=200.0) for start in (0.0, 1.0))
    assert one["other state"][0]["queue"].any(1).all()
    used = [float((a["loss"] - b["loss"]).abs()) > 1e-4 for a, b in zip(one["loss"], unused["loss"], strict=True)]
    assert used == [False, False, True, True]
    for found in ranks(3, trained, 0.0, timeout_s=200.0):
        for part in verify.PARTS:
            error, name = verify.worst(found[part], one[part], verify.MIN_NORM_FRACTION["fp64"])
            assert error < verify.TOLERANCE["fp64"], f"{part}: {name}"
