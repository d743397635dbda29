"""NT-Xent as five Triton kernels, in which similarities exist only in registers.

This module has the functions of ``tiled``, for bf16 and fp16 rows of up to 256 numbers on a GPU (or on a CPU with
``TRITON_INTERPRET=1``).  See ``op`` for the formula and the names.  Tensor cores multiply the rows without
normalization, and the fp32 products are divided by the lengths, so that bf16 inputs are not rounded a second time.
There are no atomics, so the same input gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sslx_kernels.nt_xent import triton_kernels
from sslx_kernels.nt_xent.rows import EPS, Block, Excluded, Rows

_MAX_SYMMETRIC_ROWS = 131_072
"""Maximum number of rows for the symmetric forward, whose partial sums then take 67 MB."""
_NUM_MULTIPROCESSORS = 132
"""Number of blocks that fill an H100.  If there are fewer blocks of rows, the gradient's columns are split as well."""
_MAX_PARTS = 16
"""Maximum number of parts of the gradient's columns.  Each part is N x D numbers in fp32."""
BOOST = 2.0**20
"""Factor on softmax's weights before they are rounded to fp16.  The weights are at most 2 and are divided by a column's
length of at least 64.  Without the factor, weights of one in four million would underflow; with it the largest is
32,768."""


@dataclass(frozen=True)
class Tile:
    """The size of one kernel's tile, and the number of warps and pipeline stages that Triton runs it with."""

    rows: int
    cols: int
    warps: int
    stages: int


def forward_tile(dim: int, generation: int) -> Tile:
    """Return the tile of the forward for padded rows of ``dim`` numbers on sm_80, 90, 100 or 120 (generation 8 to 12).

    These are the largest tiles that spill no registers, or very few, with Triton 3.8 and 3.9.  This was measured by
    compiling them (tests/kernels/test_ahead_of_time.py).
    """
    if generation == 9 and dim <= 128:
        return Tile(128, 128, 8, 3)
    if (generation == 10 and dim >= 128) or (generation == 9 and dim == 256):
        return Tile(64, 64, 8, 3)
    if generation in (9, 10) or dim <= 64:
        return Tile(64, 64, 4, 3)
    return Tile(64, 64, 8, 3) if dim <= 128 else Tile(64, 32, 8, 2)


def backward_tile(dim: int, generation: int) -> Tile:
    """Return the tile of the backward, chosen as in ``forward_tile``; it also keeps ``rows`` × ``dim`` sums."""
    max_dim = 128 if generation in (9, 10) else 64
    return Tile(128, 64, 8, 3) if dim <= max_dim else Tile(64, 64, 8, 2)


def generation(device: torch.device) -> int:
    """Return the major version of a GPU's compute capability, or 9 if there is no GPU."""
    has_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device)[0] if has_gpu else 9


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **constants: Any) -> None:
    """Run the kernel on x's device, even if another device is current.  Do nothing for fake tensors."""
    if isinstance(x, FakeTensor):
        return
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, **constants)


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of prepared rows, fp16.

    A bf16 row at a length of about 100 loses nothing in fp16, whose products are as fast.  Softmax's weights must be
    rounded to the same dtype for their product, and keep 11 bits in fp16 instead of 8 in bf16.
    """
    assert dtype in (torch.float16, torch.bfloat16)
    return torch.float16


def saved_like(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``tiled.saved_like`` does, here (2, N) and (N,) in fp32."""
    return rows.new_empty((2, len(rows)), dtype=torch.float32), rows.new_empty(len(rows), dtype=torch.float32)


def inverse(temperature: Tensor) -> Tensor:
    """Return the temperature itself, because the kernels divide by it."""
    return temperature


def prepare(z1: Tensor, z2: Tensor | None = None) -> Rows:
    """Multiply each row of [z1; z2] by the power of two that brings its length into [64, 128).

    This is exact, and products of such rows do not overflow.  Rows shorter than ``EPS`` become zeros, and rows with an
    inf or a NaN become NaN.  The scales are (2, N) in fp32: the inverse lengths of the prepared rows (0 for zeros) and
    of the raw rows.
    """
    second = z1 if z2 is None else z2
    z1, second = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, second))
    num = len(z1) + (0 if z2 is None else len(z2))
    x = z1.new_empty((num, z1.shape[1]), dtype=prepared_dtype(z1.dtype))
    scales = z1.new_empty((2, num), dtype=torch.float32)
    _prepare(z1, second, x, scales, store=True)
    return Rows(x, scales)


def prepare_received(x: Tensor) -> Rows:
    """Return rows x (N, D) that another rank has prepared as ``Rows``, whose scales are 1 / |x_i|, (1, N)."""
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
    rows: Rows, columns: Rows | None, excluded: Excluded, inverse_temperature: Tensor, shift_free: bool
) -> tuple[Tensor, ...]:
    """Return partial sums over the negatives of exp(s_ij / T) for each row, (parts, N).

    Unless ``shift_free``, also return the largest exponent of each part, (parts, N), in units of log(2), by which the
    exponents were reduced.
    """
    x, y = rows.x, (rows if columns is None else columns).x
    num_rows, num_cols, padded = len(x), len(y), _padded(x.shape[1])
    b = forward_tile(padded, generation(x.device))
    symmetric = columns is None and shift_free and num_rows <= _MAX_SYMMETRIC_ROWS
    if symmetric:
        side = max(b.rows, b.cols) * (2 if num_rows <= 32_768 else 8)
        panels, tiles = side // b.rows, side // b.cols
    else:  # one panel of rows, and as many parts of the columns as fill a GPU, but at most 32
        parts = min(32, triton.cdiv(num_cols, b.cols), triton.cdiv(4 * _NUM_MULTIPROCESSORS * b.rows, num_rows))
        panels, tiles = 1, triton.next_power_of_2(triton.cdiv(triton.cdiv(num_cols, b.cols), parts))
    grid = triton.cdiv(num_rows, panels * b.rows), triton.cdiv(num_cols, tiles * b.cols)
    total = x.new_empty((grid[1], num_rows), dtype=torch.float32)
    largest = total if shift_free else torch.empty_like(total)
    launch(
        triton_kernels.sums_kernel, grid,
        x, y, rows.scales, (rows if columns is None else columns).scales, *_index_arguments(excluded, x),
        inverse_temperature, total, largest, num_rows, num_cols,
        D=x.shape[1], NAMED=_excluded_kind(excluded), SYMMETRIC=symmetric, SHIFT_FREE=shift_free,
        BM=b.rows, BN=b.cols, BD=padded, PANELS=panels, TILES=tiles, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return (total,) if shift_free else (total, largest)


def loss_from_sums(
    rows: Rows,
    columns: Rows | None,
    excluded: Excluded,
    all_sums: Sequence[tuple[Tensor, ...]],
    inverse_temperature: Tensor,
    shift_free: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ``tiled.loss_from_sums`` does, in fp32.

    Denominators are 1 / L_i if ``shift_free``, and log2 L_i otherwise.
    """
    parts = all_sums[0] if len(all_sums) == 1 else tuple(torch.cat(tensors) for tensors in zip(*all_sums, strict=True))
    x, columns = rows.x, rows if columns is None else columns
    num, (block, padded) = len(x), _small_blocks(x.shape[1])
    denominators, negative_probs = (x.new_empty(num, dtype=torch.float32) for _ in range(2))
    losses = x.new_empty(triton.cdiv(num, block), dtype=torch.float32)
    launch(
        triton_kernels.loss_kernel, losses.shape,
        x, columns.x, rows.scales, columns.scales, _index_arguments(excluded, x)[1], inverse_temperature,
        parts[0], parts[-1], denominators, negative_probs, losses, num, len(parts[0]),
        D=x.shape[1], NAMED=_excluded_kind(excluded), SHIFT_FREE=shift_free, BM=block, BD=padded, num_warps=4,
    )  # fmt: skip
    return losses.sum(), denominators, negative_probs


def gradient(
    rows: Rows,
    blocks: Sequence[Block],
    denominators: Tensor,
    negative_probs: Tensor,
    upstream: Tensor,
    inverse_temperature: Tensor,
    shift_free: bool,
    needs_columns: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of the loss, as ``tiled.gradient`` does."""
    x, symmetric, excluded = rows.x, blocks[0].columns is None, blocks[0].excluded
    num, (block, padded) = len(x), _small_blocks(x.shape[1])
    splits = [_splits(num, len((rows if b.columns is None else b.columns).x), x) for b in blocks]
    parts = x.new_empty((sum(split for split, _ in splits), *x.shape), dtype=torch.float32)
    start = 0
    for b, (split, width) in zip(blocks, splits, strict=True):
        columns, column_denominators = (rows, denominators) if b.columns is None else (b.columns, b.denominators)
        _unit_gradient(
            rows, columns, b.excluded, inverse_temperature, denominators, column_denominators,
            parts[start : start + split], width, shift_free=shift_free,
        )  # fmt: skip
        start += split
    d, first = torch.empty_like(parts[0]), blocks[0].columns or rows
    temperature_parts = x.new_empty(triton.cdiv(num, block), dtype=torch.float64)
    launch(
        triton_kernels.raw_gradient_kernel, temperature_parts.shape,
        x, first.x, rows.scales, first.scales, rows.scales[1], _index_arguments(excluded, x)[1], inverse_temperature,
        upstream, negative_probs, parts, d, temperature_parts, num, len(parts),
        D=x.shape[1], NAMED=_excluded_kind(excluded), SYMMETRIC=symmetric, EPS=EPS, BM=block, BD=padded, num_warps=4,
    )  # fmt: skip
    dy = None
    if needs_columns:
        scale = upstream.double() / (inverse_temperature.double() * num)
        dy = _column_gradient(rows, blocks[0], denominators, negative_probs, inverse_temperature, scale, shift_free)
    return d, dy, temperature_parts


def _column_gradient(
    rows: Rows, block: Block, denominators: Tensor, negative_probs: Tensor, inverse_temperature: Tensor, scale: Tensor,
    shift_free: bool,
) -> Tensor:  # fmt: skip
    """Return the gradient of the raw columns (M, D)."""
    columns = block.columns
    assert columns is not None
    assert block.excluded is not None
    split, width = _splits(len(columns.x), len(rows.x), columns.x)
    parts = columns.x.new_empty((split, *columns.x.shape), dtype=torch.float32)
    _unit_gradient(
        columns, rows, block.excluded, inverse_temperature, None, denominators, parts, width, shift_free=shift_free
    )
    u, v = (prepared.x.float() * prepared.scales[0][:, None] for prepared in (rows, columns))
    d = parts.sum(0)
    # Two rows may share a positive, and only index_put_ adds in a fixed order, unlike index_add_.
    d.index_put_((block.excluded[1],), -negative_probs[:, None] * u, accumulate=True).mul_(scale.float())
    to_raw = columns.scales[1][:, None]
    along = torch.where(to_raw < 1 / EPS, torch.linalg.vecdot(v, d)[:, None], 0)
    return d.addcmul_(v, along, value=-1).mul_(to_raw)


def _unit_gradient(
    rows: Rows, columns: Rows, excluded: Excluded, temperature: Tensor, row_denominators: Tensor | None,
    column_denominators: Tensor | None, parts: Tensor, width: int, *, shift_free: bool,
) -> None:  # fmt: skip
    """Fill parts (P, N, D) of the unit rows' gradient, each of which is a sum over ``width`` columns.

    row_denominators: None if the rows are columns of the loss and the other way around; ``excluded`` then gives the
      excluded rows of each column.
    """
    x = rows.x
    padded = _padded(x.shape[1])
    b = backward_tile(padded, generation(x.device))
    launch(
        triton_kernels.gradient_kernel, (triton.cdiv(len(x), b.rows), len(parts)),
        x, columns.x, rows.scales, columns.scales, *_index_arguments(excluded, x), temperature,
        parts if row_denominators is None else row_denominators,
        parts if column_denominators is None else column_denominators, parts,
        len(x), len(columns.x), width,
        D=x.shape[1], NAMED=_excluded_kind(excluded), ON_COLUMNS=row_denominators is None, SHIFT_FREE=shift_free,
        HAS_ROW=row_denominators is not None, HAS_COL=column_denominators is not None, BOOST=BOOST,
        BM=b.rows, BN=b.cols, BD=padded, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip


def _splits(num_rows: int, num_cols: int, x: Tensor) -> tuple[int, int]:
    """Return the number of parts of the columns that fill a GPU, and the number of columns in each part."""
    b = backward_tile(_padded(x.shape[1]), generation(x.device))
    tiles = triton.cdiv(num_cols, b.cols)
    parts = max(1, min(_NUM_MULTIPROCESSORS // triton.cdiv(num_rows, b.rows), tiles, _MAX_PARTS))
    tiles_per_part = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, tiles_per_part), tiles_per_part * b.cols


def _padded(dim: int) -> int:
    """Return the power of two to which the kernels pad rows of ``dim`` numbers."""
    return max(16, triton.next_power_of_2(dim))


def _small_blocks(dim: int) -> tuple[int, int]:
    """Return the rows and the padded dim of a block in the kernels that read each row once."""
    padded = _padded(dim)
    return max(4, 2048 // padded), padded


def _excluded_kind(excluded: Excluded) -> str:
    """Return the kernels' constant NAMED."""
    if excluded is None:
        return "pairs"
    return "given" if excluded else "none"


def _index_arguments(excluded: Excluded, unread: Tensor) -> Sequence[Tensor]:
    """Return (self_column, positive_column), or placeholders that the kernels do not read."""
    return excluded or (unread, unread)
