"""The sums and gradients behind NT-Xent, tile by tile in plain PyTorch: never N×M numbers at a time.

Similarities are computed where they are used, once in the forward and once again in the backward, in tiles of at
most ``TILE`` × ``TILE``.  Where the rows are the columns too, a tile above the diagonal serves its mirror image:
4·N²·D floating-point operations forward and backward together, where autograd on the N×N matrix takes 6.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

EPS = 1e-12
"""Rows shorter than this are divided by it instead of by their length, as ``F.normalize`` does."""

TILE = 1024
"""Rows and columns of a tile: 4 MB in fp32, which stay in a CPU's caches while they are worked on."""


def factors(z: Tensor) -> Tensor:
    """What scales each row of z (N, D) to length 1: (N, 1) in fp64, NaN for a row with an inf or a NaN.

    Lengths are summed in fp64, so that a row of 1e20 is a direction like any other.
    """
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(length.isinf(), torch.nan, 1 / length.clamp_min(EPS))


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what ``prepare`` makes of rows of this one."""
    return torch.promote_types(dtype, torch.float32)


def prepare(z: Tensor, factor: Tensor) -> Tensor:
    """What the functions below take: the rows scaled to length 1, in fp32 (fp64 for fp64)."""
    dtype = prepared_dtype(z.dtype)
    return z.to(dtype).mul(factor.to(dtype)).contiguous()


def unit(x: Tensor) -> Tensor:
    """The unit rows that ``prepare`` made."""
    return x


def log_sums(
    x: Tensor, y: Tensor | None, skip: Sequence[Tensor], inverse_temperature: Tensor, shift_free: bool
) -> Tensor:
    """log sum over j of exp(x_i·y_j / T) for each row i: (N,) in fp64, -inf for an empty sum.

    x: (N, D) unit rows.  y: (M, D) unit columns, or None for x itself; then ``skip`` must be symmetric.
    skip: (N,) int64 each: a column that row i leaves out, or -1.
    inverse_temperature: (), 1/T.  shift_free: whether exp(1/T) · M is known to fit the dtype; else the largest
    exponent is taken out of each sum.
    """
    columns = x if y is None else y
    total = torch.full((len(x),), 0.0 if shift_free else -torch.inf, device=x.device, dtype=torch.float64)
    for rows, cols, tile in _similarities(x, columns, y is None, inverse_temperature):
        if shift_free:
            tile.exp_()
        _fill(tile, skip, rows, cols, 0.0 if shift_free else -torch.inf)
        _add(total[rows], tile, 1, shift_free)
        if y is None and rows != cols:
            _add(total[cols], tile, 0, shift_free)
    return total.log_() if shift_free else total


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
    """T times the gradient of sum_i g_i·L_i + sum_j h_j·C_j for x (N, D) and, if asked, for y (M, D), else None.

    L, C: ``log_sums`` of the rows over the columns, and of the columns over the rows.
    row: (g, L), (N,) each.  column: (h, C), (M,) each, or None for h = 0.  Where y is None, ``row`` is all: each L_i
    holds x_i as its row, and the other L hold it in their sums.
    """
    columns = x if y is None else y
    other = row if y is None else column
    dx = torch.zeros_like(x)
    dy = torch.zeros_like(columns) if columns_too and y is not None else None
    weights = [None if pair is None else _weights(pair, x.dtype, shift_free) for pair in (row, other)]
    spare = torch.empty(min(TILE, len(x)) * min(TILE, len(columns)), device=x.device, dtype=x.dtype)
    for rows, cols, tile in _similarities(x, columns, y is None, inverse_temperature):
        second = spare[: tile.numel()].view_as(tile)
        _weigh(tile, second, rows, cols, weights, shift_free)
        _fill(tile, skip, rows, cols, 0.0)
        dx[rows].addmm_(tile, columns[cols])
        if y is None and rows != cols:
            dx[cols].addmm_(tile.T, x[rows])
        elif dy is not None:
            dy[cols].addmm_(tile.T, x[rows])
    return dx, dy


def _similarities(x: Tensor, y: Tensor, symmetric: bool, scale: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, scale · x[rows] @ y[columns].T) of each tile, of those on and above the diagonal if symmetric.

    Every tile is the same memory: what it held before is gone.
    """
    memory = torch.empty(min(TILE, len(x)) * min(TILE, len(y)), device=x.device, dtype=x.dtype)
    every = itertools.product(_cut(0, len(x), TILE), _cut(0, len(y), TILE))
    scaled, of = x, slice(0)
    for rows, cols in _triangle(0, len(x), TILE) if symmetric else every:
        if rows != of:
            scaled, of = x[rows] * scale.to(x.dtype), rows
        shape = rows.stop - rows.start, cols.stop - cols.start
        yield rows, cols, torch.mm(scaled, y[cols].T, out=memory[: shape[0] * shape[1]].view(shape))


def _cut(first: int, last: int, side: int) -> list[slice]:
    return [slice(i, min(i + side, last)) for i in range(first, last, side)]


def _triangle(first: int, last: int, side: int) -> Iterator[tuple[slice, slice]]:
    """The tiles on and above the diagonal; those on it in halves, for half of each is computed twice."""
    for rows in _cut(first, last, side):
        if side == TILE and side > 1:
            yield from _triangle(rows.start, rows.stop, TILE // 2)
        else:
            yield rows, rows
        for cols in _cut(rows.stop, last, side):
            yield rows, cols


def _fill(tile: Tensor, skip: Sequence[Tensor], rows: slice, cols: slice, value: float) -> None:
    """Write the value where a row of the tile leaves a column out; nothing here waits for the device."""
    for index in skip:
        at = index[rows] - cols.start
        inside = (at >= 0) & (at < tile.shape[1])
        if inside.device.type == "cpu" and not inside.numpy().any():  # most tiles; a GPU's we cannot know
            continue
        at = at.clamp(0, tile.shape[1] - 1)[:, None]
        tile.scatter_(1, at, tile.gather(1, at).masked_fill_(inside[:, None], value))


def _add(total: Tensor, tile: Tensor, dim: int, shift_free: bool) -> None:
    """Merge a tile's sums along ``dim`` into the totals so far, which are logarithms unless ``shift_free``."""
    if shift_free:
        total += tile.sum(dim)
    else:
        total.copy_(torch.logaddexp(total, tile.logsumexp(dim).double()))


def _weights(pair: tuple[Tensor, Tensor], dtype: torch.dtype, shift_free: bool) -> tuple[Tensor, Tensor]:
    """What ``_weigh`` multiplies by, and takes off the exponent."""
    g, log_sum = pair[0].double(), pair[1].double()
    if shift_free:
        g, log_sum = g * (-log_sum).exp(), torch.zeros_like(log_sum)
    return g.to(dtype), log_sum.to(dtype)


def _weigh(
    tile: Tensor,
    spare: Tensor,
    rows: slice,
    cols: slice,
    weights: Sequence[tuple[Tensor, Tensor] | None],
    shift_free: bool,
) -> None:
    """tile s -> g_i·exp(s - L_i) + h_j·exp(s - C_j), in place."""
    (g, log_row), other = weights[0] or (None, None), weights[1]
    assert g is not None
    assert log_row is not None
    if shift_free:
        tile.exp_()
        tile.mul_(g[rows, None] if other is None else torch.add(g[rows, None], other[0][cols], out=spare))
        return
    torch.sub(tile, log_row[rows, None], out=spare).exp_().mul_(g[rows, None])
    if other is None:
        tile.copy_(spare)
    else:
        tile.sub_(other[1][cols]).exp_().mul_(other[0][cols]).add_(spare)
