"""SimCLR's loss of a small batch in its dense form: the tiled form's bits, and all that holds of it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.losses import nt_xent
from sslx_kernels.nt_xent import dense


def loss_and_gradients(z1: Tensor, z2: Tensor, temperature: float | Tensor, impl: str) -> list[Tensor]:
    leaves = [z.clone().requires_grad_() for z in (z1, z2)]
    loss = nt_xent(*leaves, temperature, impl=impl, min_temperature=0.05)  # pyright: ignore[reportArgumentType]
    wanted = [*leaves, temperature] if isinstance(temperature, Tensor) else leaves
    return [loss.detach(), *torch.autograd.grad(loss * 3, wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 31, 64, 200, 255])
@pytest.mark.parametrize("learned", [False, True])
def test_has_the_bits_of_the_tiled_form(
    generator: torch.Generator, dtype: torch.dtype, size: int, learned: bool
) -> None:
    z1, z2 = torch.randn(2, size, 24, generator=generator).to(dtype)
    assert dense.fits(z1, True)
    t: float | Tensor = torch.tensor([0.07], requires_grad=True) if learned else 0.07
    ours, theirs = (loss_and_gradients(z1, z2, t, impl) for impl in ("auto", "tiled"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_is_within_the_kernels_promise_of_fp64(generator: torch.Generator) -> None:
    z1 = torch.randn(100, 32, generator=generator)
    z2 = z1 + 0.5 * torch.randn(100, 32, generator=generator)
    leaves = [z.double().requires_grad_() for z in (z1, z2)]
    z = F.normalize(torch.cat(leaves), dim=1)
    truth = F.cross_entropy((z @ z.T / 0.1).fill_diagonal_(-torch.inf), torch.arange(200).roll(100))
    loss, *found = loss_and_gradients(z1, z2, 0.1, "auto")
    assert loss.item() == pytest.approx(truth.item(), rel=5e-6)
    for ours, exact in zip(found, torch.autograd.grad(truth * 3, leaves), strict=True):
        assert (ours.double() - exact).norm() <= 5e-6 * exact.norm()


def test_larger_batches_lower_temperatures_and_fp64_are_not_for_it() -> None:
    assert not dense.fits(torch.empty(257, 2), True)
    assert not dense.fits(torch.empty(8, 2), False)
    assert not dense.fits(torch.empty(8, 2, dtype=torch.float64), True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_loss_and_gradients(generator: torch.Generator, value: float) -> None:
    z1, z2 = torch.randn(2, 6, 4, generator=generator)
    z1[2, 1] = value
    assert all(x.isnan().any() for x in loss_and_gradients(z1, z2, 0.1, "auto"))


@pytest.mark.parametrize("length", [0.0, 1e-25, 1e20])
def test_rows_of_no_length_and_of_extreme_length(generator: torch.Generator, length: float) -> None:
    z1, z2 = torch.randn(2, 6, 4, generator=generator)
    z1[2] *= length
    ours, theirs = (loss_and_gradients(z1, z2, 0.1, impl) for impl in ("auto", "tiled"))
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_backward_may_be_repeated_and_a_second_derivative_is_refused(generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 6, 4, generator=generator)
    leaf = z1.requires_grad_()
    loss = nt_xent(leaf, z2)
    first, again = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert torch.equal(first, gradient)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_autocast_does_not_reach_inside(generator: torch.Generator) -> None:
    z1, z2 = torch.randn(2, 40, 16, generator=generator)
    truth = loss_and_gradients(z1, z2, 0.1, "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradients(z1, z2, 0.1, "auto")
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
