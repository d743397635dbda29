"""InfoNCE both ways and SupCon, against their definitions written as loops, and against autograd in fp64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslx_kernels.nt_xent.forms import info_nce, sup_con


def sup_con_by_loops(z: Tensor, label: Tensor, temperature: float) -> float:
    """L_out of arXiv 2004.11362, in Python's own floats."""
    u = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in z.tolist()]
    losses: list[float] = []
    for i, a in enumerate(u):
        s = [sum(x * y for x, y in zip(a, b, strict=True)) / temperature for b in u]
        positives = [j for j in range(len(u)) if j != i and label[j] == label[i]]
        if positives:
            log_sum = math.log(sum(math.exp(x) for j, x in enumerate(s) if j != i))
            losses.append(sum(log_sum - s[p] for p in positives) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_sup_con_is_the_definition_and_a_row_alone_in_its_class_counts_for_nothing(
    generator: torch.Generator, impl: str
) -> None:
    z = torch.randn(12, 5, dtype=torch.float64, generator=generator).requires_grad_()
    label = torch.tensor([0, 1, 1, 2, 0, 0, 1, 4, 2, 2, 0, 1])
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert sup_con(z, label, 6, t, impl).item() == pytest.approx(sup_con_by_loops(z, label, 0.3), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z, t: sup_con(z, label, 6, t, impl), (z, t))
    assert sup_con(z, torch.arange(12), 12, 0.3, impl).item() == 0


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_sup_con_in_fp32_is_that_of_fp64(generator: torch.Generator, temperature: float) -> None:
    z = torch.randn(150, 24, generator=generator)
    label = torch.randint(7, (150,), generator=generator)
    found: list[tuple[float, Tensor]] = []
    for leaf, impl in ((z.clone(), "tiled"), (z.double(), "reference")):
        loss = sup_con(leaf.requires_grad_(), label, 7, temperature, impl)
        found.append((loss.item(), torch.autograd.grad(loss, leaf)[0].double()))
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-6)
    assert (found[0][1] - found[1][1]).norm() < 3e-5 * found[1][1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1])
def test_half_precision_costs_sup_cons_gradient_one_rounding(
    dtype: torch.dtype, spread: float, generator: torch.Generator
) -> None:
    label = torch.arange(300) % 10
    centres = torch.randn(10, 64, generator=generator)
    z = (centres[label] + spread * torch.randn(300, 64, generator=generator)).to(dtype)
    found: list[Tensor] = []
    for leaf, impl in ((z.clone(), "auto"), (z.double(), "reference")):
        loss = sup_con(leaf.requires_grad_(), label, 10, 0.1, impl)
        found.append(torch.autograd.grad(loss, leaf)[0].double())
    rounding = (found[1].to(dtype).double() - found[1]).norm()
    assert (found[0] - found[1]).norm() < 1.2 * rounding + 5e-4 * found[1].norm()
    with pytest.raises(ValueError, match=r"impl='fused' "):
        sup_con(z, label, 10, 0.1, "fused")


def test_sup_con_with_two_views_a_class_is_nt_xent(generator: torch.Generator) -> None:
    z = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    own = torch.arange(10)
    from sslx_kernels.nt_xent import nt_xent

    assert sup_con(z, own % 5, 5, 0.2).item() == pytest.approx(nt_xent(z, z, own, own.roll(5), 0.2).item(), rel=1e-12)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_info_nce_is_clips_loss_both_ways(generator: torch.Generator, impl: str) -> None:
    a, b = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    theirs = [x.clone().requires_grad_() for x in (a, b)]
    logits = F.normalize(theirs[0], dim=1) @ F.normalize(theirs[1], dim=1).T / 0.07
    truth = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
    loss = info_nce(*leaves, 0.07, impl)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, theirs))


def test_a_label_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"a label \(N,\) int64, got \(4, 3\) and \(3,\)"):
        sup_con(torch.ones(4, 3), torch.arange(3), 3, 0.1)
