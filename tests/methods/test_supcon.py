"""SupCon: L_out against loops on 1, 2 and 3 ranks, its limits, its metrics, labels that are not there."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kit import full_batch, tiny
from sslx import losses
from sslx.errors import ConfigError
from sslx.methods import supcon
from sslx.methods.base import Embedded

LABELS = [[7, 7, -3, 0, 7, 0, 10**12, 7, 0, 7, -3, 1], [5] * 12, list(range(12))]


def by_loops(z1: Tensor, z2: Tensor, label: list[int], temperature: float) -> tuple[Tensor, float]:
    """(L_out of arXiv 2004.11362, equation 2, over the 2B embeddings; the mean of positives' cosines), pair by pair."""
    u = [row / (row * row).sum().sqrt() for row in [*z1, *z2]]
    of, num = [*label, *label], 2 * len(label)
    total, cosines = torch.zeros((), dtype=z1.dtype), 0.0
    for i in range(num):
        s = {j: (u[i] * u[j]).sum() for j in range(num) if j != i}
        denominator = sum((torch.exp(x / temperature) for x in s.values()), torch.zeros((), dtype=z1.dtype))
        positives = [j for j in s if of[j] == of[i]]
        for p in positives:
            total = total - torch.log(torch.exp(s[p] / temperature) / denominator) / len(positives)
            cosines += s[p].item() / len(positives)
    return total / num, cosines / num


def oracle(z1: Tensor, z2: Tensor, label: Tensor) -> Tensor:
    return by_loops(z1, z2, label.tolist(), 0.2)[0]


@full_batch.over_ranks
@pytest.mark.parametrize("label", LABELS, ids=["labels", "one label", "each its own"])
def test_ranks_give_l_out_over_the_whole_batch(
    world_size: int, label: list[int], ranks: full_batch.RunOnRanks, generator: torch.Generator
):
    inputs = torch.randn(2, 12, 5, dtype=torch.float64, generator=generator).unbind()
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    loss, given = partial(losses.sup_con, temperature=0.2), [torch.tensor(label)]
    # Where no two samples share a label, the gathered sums cancel, with their gradients.
    bugs = ["all_gather_grad"] if len(set(label)) < 12 else []
    full_batch.check(ranks, world_size, loss, oracle, inputs, weight, given=given, bugs=bugs)
    z1, z2 = (x @ weight for x in inputs)
    assert losses.sup_con(z1, z2, *given, 0.2)[1].item() == pytest.approx(by_loops(z1, z2, label, 0.2)[1], rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.02])
def test_in_fp32_it_is_that_of_fp64(temperature: float, generator: torch.Generator):
    z = torch.randn(2, 100, 24, generator=generator)
    label = torch.randint(7, (100,), generator=generator)
    found: list[tuple[float, Tensor]] = []
    for leaf in (z.clone(), z.double()):
        loss, _ = losses.sup_con(leaf.requires_grad_()[0], leaf[1], label, temperature)
        found.append((loss.item(), torch.autograd.grad(loss, leaf)[0].double()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[1][1].norm()


def on_a_matrix(z1: Tensor, z2: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Equation 2 on the matrix of all similarities, in fp64."""
    u = nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1)
    same = label.repeat(2)[:, None] == label.repeat(2)
    same.fill_diagonal_(False)
    s = (u @ u.T / temperature).fill_diagonal_(-torch.inf)
    return (s.logsumexp(1) - s.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def errors_of_gradient(z: Tensor, label: Tensor, temperature: float) -> tuple[float, float]:
    """Of the gradient of z (2, B, D), and of the true one when it is only rounded, as shares of the true one."""
    exact, ours = z.double().requires_grad_(), z.clone().requires_grad_()
    (truth,) = torch.autograd.grad(on_a_matrix(*exact, label, temperature), exact)
    (found,) = torch.autograd.grad(losses.sup_con(*ours, label, temperature)[0], ours)
    assert found.dtype == z.dtype
    return tuple(float((x.double() - truth).norm() / truth.norm()) for x in (found, truth.to(z.dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1])
def test_half_precision_costs_the_gradient_one_rounding_also_where_classes_have_formed(
    dtype: torch.dtype, spread: float, generator: torch.Generator
):
    """The gradients of its two parts nearly cancel there: rounded before they are added, they were 42 % off."""
    label = torch.arange(256) % 10
    centers = torch.randn(10, 64, generator=generator)
    z = (centers[label] + spread * torch.randn(2, 256, 64, generator=generator)).to(dtype)
    error, rounding = errors_of_gradient(z, label, 0.1)
    assert error < 1.2 * rounding + 5e-4


def make(**options: Any) -> supcon.Method:
    return tiny.build(supcon.Config(**{"hidden_dim": 24, "projection_dim": 12, **options}))


def test_the_method_compares_what_it_embeds(generator: torch.Generator):
    method = make(temperature=0.3)
    images = tiny.batch(method, generator)
    assert images.label is not None
    z1, z2 = method.projector(method.encoder(torch.cat(images.views))).double().chunk(2)
    expected, alignment = by_loops(z1, z2, images.label.tolist(), 0.3)
    step = method(images)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert step.metrics["alignment"].item() == pytest.approx(alignment, abs=1e-5)


def test_a_source_without_labels_is_refused_in_one_line():
    supcon.Config().check(6, tiny.LABELED)
    with pytest.raises(ConfigError, match=r"^supcon needs a source with labels[^\n]*$"):
        supcon.Config().check(6, tiny.UNLABELED)


def test_metrics_say_how_alike_positives_are_and_how_spread_all_are(generator: torch.Generator):
    method = make()
    label = torch.arange(256) % 8
    centers = torch.randn(8, 512, generator=generator)
    apart = method.loss(Embedded((centers[label], centers[label]), (label,))).metrics
    collapsed = method.loss(Embedded((centers[label * 0], centers[label * 0]), (label,))).metrics
    assert apart["alignment"].item() == pytest.approx(1, abs=1e-5)
    assert apart["std"].item() == pytest.approx(math.sqrt(7 / 8), abs=0.15)  # eight directions, nearly orthogonal
    assert collapsed["alignment"].item() == pytest.approx(1, abs=1e-5)
    assert collapsed["std"] < 1e-3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a label \(4,\) int64, got \(3,\)"):
        losses.sup_con(torch.ones(4, 3), torch.ones(4, 3), torch.arange(3))
