"""The sums and gradients behind NT-Xent as two Triton kernels: a similarity lives in registers only.

The same functions as in ``tiled``, for bf16 and fp16 rows of up to 256 numbers on a GPU (or, with
``TRITON_INTERPRET=1``, on a CPU).  Rows are multiplied as they came, by tensor cores; their lengths are divided out of
the fp32 products, so bf16 inputs are not rounded a second time.  No atomics: the same input gives the same bits.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sslx_kernels.nt_xent import triton_kernels
from sslx_kernels.nt_xent.tiled import EPS

_LOG2_E = 1.4426950408889634
_LARGEST_SYMMETRIC = 131_072
"""Rows up to which the symmetric forward is used: its partial sums then take 67 MB."""
BOOST = 2.0**20
"""What softmax's weights, over a column's length of 64 or more, are multiplied by before they are rounded to fp16: one
in four million is no number there.  The largest, 2, becomes 32,768."""
_sums_kernel: Any = triton_kernels.sums_kernel
_gradient_kernel: Any = triton_kernels.gradient_kernel


@dataclass(frozen=True)
class Blocks:
    """One kernel's tile and how Triton is to run it."""

    rows: int
    cols: int
    warps: int
    stages: int


def forward_blocks(dim: int, generation: int) -> Blocks:
    """Tiles of the forward for (padded) rows of ``dim`` numbers on GPUs of sm_80, 90 or 100 (generation 8, 9, 10).

    The largest that were found to spill no register, by compiling them (tests/kernels/test_ahead_of_time.py).
    """
    if generation == 9 and dim <= 128:
        return Blocks(128, 128, 8, 3)
    if generation >= 9 or dim <= 64:
        return Blocks(64, 64, 4, 3)
    return Blocks(64, 64, 8, 3) if dim <= 128 else Blocks(64, 32, 8, 2)


def backward_blocks(dim: int, generation: int) -> Blocks:
    """Tiles of the backward, which also holds ``rows`` × ``dim`` sums in registers; found likewise."""
    small = 128 if generation >= 9 else 64
    return Blocks(128, 64, 8, 3) if dim <= small else Blocks(64, 64, 8, 2)


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what ``prepare`` makes of rows of this one: fp16.

    A row of bf16 at a length of about 100 loses nothing in fp16, whose products are as fast; and softmax's weights,
    rounded to the same dtype for their product, keep 11 bits instead of 8.
    """
    assert dtype in (torch.float16, torch.bfloat16)
    return torch.float16


def prepare(z: Tensor, factor: Tensor) -> Tensor:
    """The rows times the power of two that brings each to a length in [64, 128): exact, and no product overflows.

    Rows shorter than ``EPS`` become zeros, rows with an inf or a NaN become NaN.
    """
    power = torch.exp2(torch.ceil(torch.log2(factor))) * 64
    scaled = z.double() * torch.where(factor < 1 / EPS, power, factor * 0)
    return scaled.to(prepared_dtype(z.dtype)).contiguous()


def unit(x: Tensor) -> Tensor:
    """The rows that ``prepare`` made, at length 1 (zeros stay zeros), in fp32."""
    return x.float() * _scales(x)[:, None]


def log_sums(
    x: Tensor, y: Tensor | None, skip: Sequence[Tensor], inverse_temperature: Tensor, shift_free: bool
) -> Tensor:
    """As in ``tiled``, of prepared rows."""
    columns = x if y is None else y
    num_rows, num_cols, dim = len(x), len(columns), x.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    b = forward_blocks(padded, _generation(x.device))
    symmetric = y is None and shift_free and num_rows <= _LARGEST_SYMMETRIC
    if symmetric:
        side = max(b.rows, b.cols) * (2 if num_rows <= 32_768 else 8)
        panels, tiles = side // b.rows, side // b.cols
    else:  # one panel of rows and enough parts of the columns to fill a GPU, at most 32
        parts = min(32, triton.cdiv(num_cols, b.cols), triton.cdiv(528 * b.rows, num_rows))
        panels, tiles = 1, triton.next_power_of_2(triton.cdiv(triton.cdiv(num_cols, b.cols), parts))
    grid = triton.cdiv(num_rows, panels * b.rows), triton.cdiv(num_cols, tiles * b.cols)
    sums = x.new_empty((grid[1], num_rows), dtype=torch.float32)
    largest = sums if shift_free else torch.empty_like(sums)
    _sums_kernel[grid](
        x, columns, _scales(x), _scales(columns), _stacked(skip, x), inverse_temperature.float(), sums, largest,
        num_rows, num_cols,
        D=dim, NUM_SKIP=len(skip), SYMMETRIC=symmetric, SHIFT_FREE=shift_free,
        BM=b.rows, BN=b.cols, BD=padded, PANELS=panels, TILES=tiles, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    if shift_free:
        return sums.double().sum(0).log()
    return (sums.double().log() + largest.double() / _LOG2_E).logsumexp(0)


def gradients(
    x: Tensor,
    y: Tensor | None,
    skip: Sequence[Tensor],
    inverse_temperature: Tensor,
    shift_free: bool,
    row: tuple[Tensor, Tensor],
    column: tuple[Tensor, Tensor] | None,
    columns_too: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As in ``tiled``, of prepared rows, for the unit rows, in fp32."""
    named, inverse = _stacked(skip, x), inverse_temperature.float()
    run = functools.partial(_gradient, num_skip=len(skip), shift_free=shift_free)
    if y is None:
        return run(x, x, named, inverse, row, row, on_columns=False), None
    dx = run(x, y, named, inverse, row, column, on_columns=False)
    return dx, run(y, x, named, inverse, column, row, on_columns=True) if columns_too else None


def _gradient(
    x: Tensor,
    y: Tensor,
    skip: Tensor,
    inverse: Tensor,
    row: tuple[Tensor, Tensor] | None,
    column: tuple[Tensor, Tensor] | None,
    *,
    num_skip: int,
    on_columns: bool,
    shift_free: bool,
) -> Tensor:
    dim = x.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    b = backward_blocks(padded, _generation(x.device))
    result = x.new_empty(x.shape, dtype=torch.float32)
    weights: list[Tensor] = []
    for pair in (row, column):
        if pair is None:
            weights += [result, result]  # not read
            continue
        g, log_sum = pair[0].double(), pair[1].double()
        weights += [(g * (-log_sum).exp() if shift_free else g).float(), (log_sum * _LOG2_E).float()]
    _gradient_kernel[(triton.cdiv(len(x), b.rows),)](
        x, y, _scales(x), _scales(y), skip, inverse, *weights, result,
        len(x), len(y),
        D=dim, NUM_SKIP=num_skip, ON_COLUMNS=on_columns, SHIFT_FREE=shift_free,
        HAS_ROW=row is not None, HAS_COL=column is not None, BOOST=BOOST,
        BM=b.rows, BN=b.cols, BD=padded, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return result


def _scales(x: Tensor) -> Tensor:
    """(N,) fp32: what brings each prepared row to length 1; 0 for zeros."""
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    return torch.where(length == 0, 0, 1 / length).float()


def _stacked(skip: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(skip)).int() if skip else torch.empty(0, dtype=torch.int32, device=like.device)
