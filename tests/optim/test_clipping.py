"""The norm of the whole gradient and clipping by it, against plain sums in Python's own floats."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sslx.optim import clip_by_norm, global_norm

SHAPES = [(3, 2, 3, 3), (7,), (1, 5), (11, 4)]


def draw(generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    gradients = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    gradients[0] = gradients[0].to(memory_format=torch.channels_last)
    return gradients


def numbers(gradients: list[Tensor]) -> list[float]:
    return [number for gradient in gradients for number in gradient.double().flatten().tolist()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_a_longer_gradient_gets_the_limit_as_its_norm_and_keeps_its_direction(
    dtype: torch.dtype, tolerance: float, generator: torch.Generator, no_host_sync: Any
) -> None:
    gradients = draw(generator, dtype)
    before = numbers(gradients)
    norm = math.sqrt(math.fsum(number**2 for number in before))
    with no_host_sync:
        measured = global_norm(gradients)
        clip_by_norm(gradients, measured, 0.3)
    assert measured.dtype == torch.float64
    assert float(measured) == pytest.approx(norm, rel=tolerance)
    assert numbers(gradients) == pytest.approx([0.3 / norm * number for number in before], rel=3 * tolerance)


@pytest.mark.parametrize("times", [1.0, 1.5])
def test_a_gradient_that_is_no_longer_than_the_limit_keeps_its_bits(times: float, generator: torch.Generator) -> None:
    gradients = draw(generator, torch.float32)
    before = [gradient.clone() for gradient in gradients]
    norm = global_norm(gradients)
    clip_by_norm(gradients, norm, times * float(norm))
    assert all(map(torch.equal, gradients, before))


def test_a_gradient_of_zeros_stays_zero() -> None:
    gradients = [torch.zeros(3, 2), torch.zeros(4)]
    clip_by_norm(gradients, global_norm(gradients), 1.0)
    assert numbers(gradients) == [0.0] * 10


def test_the_norm_of_finite_norms_is_finite() -> None:
    """In float32 their squares' sum would be infinite, and clipping would turn the gradient into zeros."""
    gradients = [torch.full((1,), 1.7e19) for _ in range(8)]
    assert not torch.stack(gradients).norm().isfinite()
    norm = global_norm(gradients)
    assert float(norm) == pytest.approx(math.sqrt(8) * 1.7e19)
    clip_by_norm(gradients, norm, 1.0)
    assert numbers(gradients) == pytest.approx([math.sqrt(1 / 8)] * 8)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_number_that_is_not_finite_makes_the_norm_so(bad: float, generator: torch.Generator) -> None:
    gradients = draw(generator, torch.float32)
    gradients[2][0, 3] = bad
    assert not global_norm(gradients).isfinite()
