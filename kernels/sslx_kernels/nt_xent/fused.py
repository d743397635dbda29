"""NT-Xent as five Triton kernels: a similarity lives in registers only, and nothing else is a launch of its own.

The same functions as in ``tiled``, for bf16 and fp16 rows of up to 256 numbers on a GPU (or, with
``TRITON_INTERPRET=1``, on a CPU).  Rows are multiplied as they came, by tensor cores; their lengths are divided out of
the fp32 products, so bf16 inputs are not rounded a second time.  No atomics: the same input gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sslx_kernels.nt_xent import triton_kernels
from sslx_kernels.nt_xent.rows import EPS, Block, Rows, Skip

_LARGEST_SYMMETRIC = 131_072
"""Rows up to which the symmetric forward is used: its partial sums then take 67 MB."""
_MULTIPROCESSORS = 132
"""Blocks that fill a GPU: an H100's.  With fewer blocks of rows, the gradient's columns are split too."""
_MOST_PARTS = 16
"""Of the gradient's columns, at most: a part is N x D numbers in fp32."""
BOOST = 2.0**20
"""What softmax's weights, over a column's length of 64 or more, are multiplied by before they are rounded to fp16: one
in four million is no number there.  The largest, 2, becomes 32,768."""


@dataclass(frozen=True)
class Blocks:
    """One kernel's tile and how Triton is to run it."""

    rows: int
    cols: int
    warps: int
    stages: int


def forward_blocks(dim: int, generation: int) -> Blocks:
    """Tiles of the forward for (padded) rows of ``dim`` numbers on GPUs of sm_80, 90, 100 or 120 (generation 8 to 12).

    The largest that were found to spill no register, or a few bytes of the rarest ones, with Triton 3.8 and 3.9, by
    compiling them (tests/kernels/test_ahead_of_time.py).
    """
    if generation == 9 and dim <= 128:
        return Blocks(128, 128, 8, 3)
    if (generation == 10 and dim >= 128) or (generation == 9 and dim == 256):
        return Blocks(64, 64, 8, 3)
    if generation in (9, 10) or dim <= 64:
        return Blocks(64, 64, 4, 3)
    return Blocks(64, 64, 8, 3) if dim <= 128 else Blocks(64, 32, 8, 2)


def backward_blocks(dim: int, generation: int) -> Blocks:
    """Tiles of the backward, which also holds ``rows`` × ``dim`` sums in registers; found likewise."""
    small = 128 if generation in (9, 10) else 64
    return Blocks(128, 64, 8, 3) if dim <= small else Blocks(64, 64, 8, 2)


def generation(device: torch.device) -> int:
    """The first digits of a GPU's compute capability; 9 where there is no GPU to ask."""
    asked = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device)[0] if asked else 9


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **constants: Any) -> None:
    """Run the kernel on x's device, whichever is the current one; on fake tensors nothing is run."""
    if isinstance(x, FakeTensor):
        return
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, **constants)


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of prepared rows of this one: fp16.

    A row of bf16 at a length of about 100 loses nothing in fp16, whose products are as fast; and softmax's weights,
    rounded to the same dtype for their product, keep 11 bits instead of 8.
    """
    assert dtype in (torch.float16, torch.bfloat16)
    return torch.float16


def kept_like(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As in ``tiled``: (2, N) and (N,) in fp32."""
    return rows.new_empty((2, len(rows)), dtype=torch.float32), rows.new_empty(len(rows), dtype=torch.float32)


def inverse(temperature: Tensor) -> Tensor:
    """The temperature itself: the kernels divide by it."""
    return temperature


def prepare(z1: Tensor, z2: Tensor | None = None) -> Rows:
    """The rows of [z1; z2] times the power of two that brings each to a length in [64, 128): exact, and no product
    overflows.  Rows shorter than ``EPS`` become zeros, rows with an inf or a NaN become NaN.

    Its scales (2, N) in fp32: what brings each prepared row to length 1 (0 for zeros), and what brings the raw one.
    """
    second = z1 if z2 is None else z2
    z1, second = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, second))
    num = len(z1) + (0 if z2 is None else len(z2))
    x = z1.new_empty((num, z1.shape[1]), dtype=prepared_dtype(z1.dtype))
    scales = z1.new_empty((2, num), dtype=torch.float32)
    _prepare(z1, second, x, scales, store=True)
    return Rows(x, scales)


def received(x: Tensor) -> Rows:
    """Rows that another rank prepared; their scales (1, N) are for the prepared ones."""
    scales = x.new_empty((1, len(x)), dtype=torch.float32)
    _prepare(x, x, x, scales, store=False)
    return Rows(x, scales)


def _prepare(z1: Tensor, z2: Tensor, x: Tensor, scales: Tensor, *, store: bool) -> None:
    num, rows, padded = len(x), *_small_blocks(x.shape[1])
    launch(
        triton_kernels.prepare_kernel, (triton.cdiv(num, rows),),
        z1, z2, x, scales, len(z1), num, z1.stride(0), z2.stride(0),
        D=x.shape[1], EPS=EPS, STORE=store, BM=rows, BD=padded, num_warps=4,
    )  # fmt: skip


def sums(
    rows: Rows, columns: Rows | None, skip: Skip, inverse_temperature: Tensor, shift_free: bool
) -> tuple[Tensor, ...]:
    """Parts of the sum over the columns of exp(s_ij / T) for each row: (parts, N), and unless ``shift_free`` of what
    was taken out of each part's exponents, in units of log(2)."""
    x, y = rows.x, (rows if columns is None else columns).x
    num_rows, num_cols, padded = len(x), len(y), _padded(x.shape[1])
    b = forward_blocks(padded, generation(x.device))
    symmetric = columns is None and shift_free and num_rows <= _LARGEST_SYMMETRIC
    if symmetric:
        side = max(b.rows, b.cols) * (2 if num_rows <= 32_768 else 8)
        panels, tiles = side // b.rows, side // b.cols
    else:  # one panel of rows and enough parts of the columns to fill a GPU, at most 32
        parts = min(32, triton.cdiv(num_cols, b.cols), triton.cdiv(4 * _MULTIPROCESSORS * b.rows, num_rows))
        panels, tiles = 1, triton.next_power_of_2(triton.cdiv(triton.cdiv(num_cols, b.cols), parts))
    grid = triton.cdiv(num_rows, panels * b.rows), triton.cdiv(num_cols, tiles * b.cols)
    total = x.new_empty((grid[1], num_rows), dtype=torch.float32)
    largest = total if shift_free else torch.empty_like(total)
    launch(
        triton_kernels.sums_kernel, grid,
        x, y, rows.scales, (rows if columns is None else columns).scales, *_named(skip, x), inverse_temperature,
        total, largest, num_rows, num_cols,
        D=x.shape[1], NAMED=_kind(skip), SYMMETRIC=symmetric, SHIFT_FREE=shift_free,
        BM=b.rows, BN=b.cols, BD=padded, PANELS=panels, TILES=tiles, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return (total,) if shift_free else (total, largest)


def finish(
    rows: Rows,
    columns: Rows | None,
    skip: Skip,
    all_sums: Sequence[tuple[Tensor, ...]],
    inverse_temperature: Tensor,
    shift_free: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in ``tiled``, all in fp32; of a denominator L, 1 / L if ``shift_free``, else log L over log 2."""
    parts = all_sums[0] if len(all_sums) == 1 else tuple(torch.cat(same) for same in zip(*all_sums, strict=True))
    x, columns = rows.x, rows if columns is None else columns
    num, (block, padded) = len(x), _small_blocks(x.shape[1])
    denominators, missed = (x.new_empty(num, dtype=torch.float32) for _ in range(2))
    losses = x.new_empty(triton.cdiv(num, block), dtype=torch.float32)
    launch(
        triton_kernels.loss_kernel, losses.shape,
        x, columns.x, rows.scales, columns.scales, _named(skip, x)[1], inverse_temperature, parts[0], parts[-1],
        denominators, missed, losses, num, len(parts[0]),
        D=x.shape[1], NAMED=_kind(skip), SHIFT_FREE=shift_free, BM=block, BD=padded, num_warps=4,
    )  # fmt: skip
    return losses.sum(), denominators, missed


def gradient(
    rows: Rows,
    blocks: Sequence[Block],
    denominators: Tensor,
    missed: Tensor,
    upstream: Tensor,
    inverse_temperature: Tensor,
    shift_free: bool,
    columns_too: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As in ``tiled``."""
    x, symmetric, skip = rows.x, blocks[0].columns is None, blocks[0].skip
    num, (block, padded) = len(x), _small_blocks(x.shape[1])
    splits = [_splits(num, len((rows if b.columns is None else b.columns).x), x) for b in blocks]
    parts = x.new_empty((sum(split for split, _ in splits), *x.shape), dtype=torch.float32)
    done = 0
    for of, (split, width) in zip(blocks, splits, strict=True):
        columns, of_columns = (rows, denominators) if of.columns is None else (of.columns, of.denominators)
        _gradient(
            rows, columns, of.skip, inverse_temperature, denominators, of_columns, parts[done : done + split], width,
            shift_free=shift_free,
        )  # fmt: skip
        done += split
    d, first = torch.empty_like(parts[0]), blocks[0].columns or rows
    shares = x.new_empty(triton.cdiv(num, block), dtype=torch.float64)
    launch(
        triton_kernels.raw_gradient_kernel, shares.shape,
        x, first.x, rows.scales, first.scales, rows.scales[1], _named(skip, x)[1], inverse_temperature, upstream,
        missed, parts, d, shares, num, len(parts),
        D=x.shape[1], NAMED=_kind(skip), SYMMETRIC=symmetric, EPS=EPS, BM=block, BD=padded, num_warps=4,
    )  # fmt: skip
    dy = None
    if columns_too:
        scale = upstream.double() / (inverse_temperature.double() * num)
        dy = _of_columns(rows, blocks[0], denominators, missed, inverse_temperature, scale, shift_free)
    return d, dy, shares


def _of_columns(
    rows: Rows, block: Block, denominators: Tensor, missed: Tensor, inverse_temperature: Tensor, scale: Tensor,
    shift_free: bool,
) -> Tensor:  # fmt: skip
    """The raw columns' gradient (M, D)."""
    columns = block.columns
    assert columns is not None
    assert block.skip is not None
    split, width = _splits(len(columns.x), len(rows.x), columns.x)
    parts = columns.x.new_empty((split, *columns.x.shape), dtype=torch.float32)
    _gradient(columns, rows, block.skip, inverse_temperature, None, denominators, parts, width, shift_free=shift_free)
    u, v = (of.x.float() * of.scales[0][:, None] for of in (rows, columns))
    d = parts.sum(0)
    # Two rows may share a positive; index_put_ adds in a fixed order, index_add_ in any.
    d.index_put_((block.skip[1],), -missed[:, None] * u, accumulate=True).mul_(scale.float())
    to_raw = columns.scales[1][:, None]
    along = torch.where(to_raw < 1 / EPS, torch.linalg.vecdot(v, d)[:, None], 0)
    return d.addcmul_(v, along, value=-1).mul_(to_raw)


def _gradient(
    rows: Rows, columns: Rows, skip: Skip, temperature: Tensor, of_rows: Tensor | None, of_columns: Tensor | None,
    parts: Tensor, width: int, *, shift_free: bool,
) -> None:  # fmt: skip
    """Fill parts (P, N, D), each from ``width`` columns.  of_rows None: ``skip`` names rows of the columns."""
    x = rows.x
    padded = _padded(x.shape[1])
    b = backward_blocks(padded, generation(x.device))
    launch(
        triton_kernels.gradient_kernel, (triton.cdiv(len(x), b.rows), len(parts)),
        x, columns.x, rows.scales, columns.scales, *_named(skip, x), temperature,
        parts if of_rows is None else of_rows, parts if of_columns is None else of_columns, parts,
        len(x), len(columns.x), width,
        D=x.shape[1], NAMED=_kind(skip), ON_COLUMNS=of_rows is None, SHIFT_FREE=shift_free,
        HAS_ROW=of_rows is not None, HAS_COL=of_columns is not None, BOOST=BOOST,
        BM=b.rows, BN=b.cols, BD=padded, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip


def _splits(num_rows: int, num_cols: int, x: Tensor) -> tuple[int, int]:
    """(parts to split the columns into so that a GPU is full, columns in each)."""
    b = backward_blocks(_padded(x.shape[1]), generation(x.device))
    tiles = triton.cdiv(num_cols, b.cols)
    parts = max(1, min(_MULTIPROCESSORS // triton.cdiv(num_rows, b.rows), tiles, _MOST_PARTS))
    each = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, each), each * b.cols


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _small_blocks(dim: int) -> tuple[int, int]:
    """(rows, padded numbers of a row) of a block of the kernels that read each row once."""
    padded = _padded(dim)
    return max(4, 2048 // padded), padded


def _kind(skip: Skip) -> str:
    return "pairs" if skip is None else "given" if skip else "none"


def _named(skip: Skip, unread: Tensor) -> Sequence[Tensor]:
    """(self_column, positive_column), or tensors that are not read."""
    return skip or (unread, unread)
