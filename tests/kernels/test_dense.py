"""SimCLR's loss of a small batch in its dense form: as accurate as the tiled form, and all else that holds of it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.losses import nt_xent
from sslx_kernels.nt_xent import dense


def loss_and_gradients(z1: Tensor, z2: Tensor, temperature: float | Tensor, impl: str) -> list[Tensor]:
    leaves = [z.clone().requires_grad_() for z in (z1, z2)]
    loss = nt_xent(*leaves, temperature, impl=impl, min_temperature=0.0243)  # pyright: ignore[reportArgumentType]
    wanted = [*leaves, temperature] if isinstance(temperature, Tensor) else leaves
    return [loss.detach(), *torch.autograd.grad(loss * 3, wanted)]


def exactly(z1: Tensor, z2: Tensor, temperature: float) -> list[Tensor]:
    """What ``loss_and_gradients`` gives, in fp64, the positive kept out of the sum."""
    leaves = [z.double().requires_grad_() for z in (z1, z2)]
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    z, size = F.normalize(torch.cat(leaves), dim=1), len(z1)
    similarities, positive = z @ z.T, torch.arange(2 * size).roll(size)[:, None]
    negatives = (similarities / t).fill_diagonal_(-torch.inf).scatter(1, positive, -torch.inf).logsumexp(1)
    loss = F.softplus(negatives - similarities.gather(1, positive)[:, 0] / t).mean()
    return [loss.detach(), *torch.autograd.grad(loss * 3, [*leaves, t])]


@pytest.mark.parametrize("spread", [3.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("size", [2, 3, 31, 64, 256])
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.03])
@pytest.mark.parametrize("learned", [False, True])
def test_is_within_the_kernels_promise_of_fp64(
    generator: torch.Generator, spread: float, size: int, temperature: float, learned: bool
) -> None:
    """From a fresh network to a batch that has converged, where a dense softmax loses up to all digits."""
    z1 = torch.randn(size, 32, generator=generator)
    z2 = z1 + spread * torch.randn(size, 32, generator=generator)
    assert dense.fits(z1, 0.03)
    t = torch.tensor([temperature], requires_grad=True) if learned else temperature
    truth, promise = exactly(z1, z2, float(torch.tensor(temperature))), max(5e-6, 1e-6 / temperature)
    found = loss_and_gradients(z1, z2, t, "auto")
    assert found[0].item() == pytest.approx(truth[0].item(), rel=promise)
    for ours, exact in zip(found[1:3], truth[1:3], strict=True):
        assert (ours.double() - exact).norm() <= promise * exact.norm()
    for ours in found[3:]:  # a small difference of similarities over T²
        assert ours.item() == pytest.approx(truth[3].item(), rel=promise, abs=promise / temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_takes_half_precision_and_computes_in_fp32(generator: torch.Generator, dtype: torch.dtype) -> None:
    z1, z2 = torch.randn(2, 60, 32, generator=generator).to(dtype)
    truth, found = exactly(z1, z2, 0.1), loss_and_gradients(z1, z2, 0.1, "auto")
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(truth[0].item(), rel=5e-6)
    for ours, exact in zip(found[1:], truth[1:], strict=False):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exact.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=1e-5)


def test_larger_batches_lower_temperatures_and_fp64_are_not_for_it() -> None:
    assert dense.fits(torch.empty(256, 2), 0.0243)
    for size, temperature, dtype in ((257, 0.1, None), (1, 0.1, None), (8, 0.0242, None), (8, 0.1, torch.float64)):
        assert not dense.fits(torch.empty(size, 2, dtype=dtype), temperature)


def test_the_lowest_temperature_holds_where_all_negatives_are_equal_and_positives_opposite() -> None:
    z1 = torch.ones(256, 8)
    loss, *gradients = loss_and_gradients(z1, -z1, 0.0243, "auto")
    assert loss.item() == pytest.approx(2 / 0.0243 + math.log(255), rel=1e-5)  # 255 others of its own view
    assert all(g.isfinite().all() for g in gradients)


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
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= 1e-5 * b.norm()


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
