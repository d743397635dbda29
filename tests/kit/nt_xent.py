"""Oracles of NT-Xent over rows and columns for the kernels' tests, and which implementations this process can run."""

import math
import os

import pytest
import torch
from torch import Tensor

from sslx_kernels.nt_xent import nt_xent, op, smallest_shift_free_temperature

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
FAST = ["tiled", "fused"] if INTERPRETED or DEVICE == "cuda" else ["tiled"]
NATIVE = {"reference": torch.float32, "tiled": torch.float32, "fused": torch.bfloat16}
TOLERANCE = {"reference": 5e-6, "tiled": 5e-6, "fused": 5e-4}
"""Of the gradient, to fp64 on the same input."""


def by_loops(rows: Tensor, columns: Tensor, self_column: Tensor, positive_column: Tensor, temperature: float) -> float:
    """Equation 1 of arXiv 2002.05709, in Python's own floats."""

    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms

    total = 0.0
    for i, row in enumerate(rows.tolist()):
        s = [cosine(row, column) / temperature for column in columns.tolist()]
        others = [x for j, x in enumerate(s) if j != int(self_column[i])]
        largest = max(others)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in others))
        total += log_sum - s[int(positive_column[i])]
    return total / len(rows)


def make(
    generator: torch.Generator, size: int = 5, dim: int = 4, first: int = 0, num: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows ``first`` to ``first + num`` of the 2 * size columns, in fp64; all of them are the columns themselves."""
    columns = torch.randn(2 * size, dim, dtype=torch.float64, generator=generator).to(DEVICE)
    own = torch.arange(2 * size, device=DEVICE)[first : None if num is None else first + num]
    return columns if num is None else columns[own], columns, own, (own + size) % (2 * size)


def cast(arguments: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same in another dtype, rows and columns still one tensor if they were."""
    rows, columns, own, positive = arguments
    if rows is columns:
        rows = columns = rows.to(dtype)
    return rows.to(dtype), columns.to(dtype), own, positive


def exact(arguments: tuple[Tensor, ...], temperature: float) -> tuple[float, Tensor]:
    """(loss, gradient of the rows, those of the columns added where they are the same) in fp64, by autograd."""
    rows, columns, own, positive = arguments
    leaf = rows.detach().double().requires_grad_()
    loss = nt_xent(leaf, leaf if rows is columns else columns.double(), own, positive, temperature, "reference")
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def raw_gradient(arguments: tuple[Tensor, ...], temperature: float, impl: str) -> tuple[float, Tensor]:
    """(loss, gradient of the rows before it is rounded to their dtype), by the operators themselves."""
    rows, columns, own, positive = arguments
    t = torch.tensor(temperature, device=rows.device)
    free = temperature >= smallest_shift_free_temperature(len(columns), torch.float32)
    given = None if rows is columns else columns
    loss, *saved = op.forward(rows, given, own, positive, t, free, impl)
    d, _, _ = op.backward(torch.ones_like(loss), *saved, own, positive, t, free, impl, False, False)
    return loss.item(), d


def close(ours: tuple[float, Tensor], truth: tuple[float, Tensor], tolerance: float, floor: float = 1e-12) -> None:
    """Within the relative tolerance, or within what is nothing: 1e-12 of the loss, ``floor`` of the gradient's norm."""
    assert ours[0] == pytest.approx(truth[0], rel=min(tolerance, 3e-5), abs=1e-12)
    assert (ours[1].double() - truth[1]).norm() <= tolerance * truth[1].norm() + floor
