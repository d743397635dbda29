"""The sums and gradients behind NT-Xent, tile by tile in plain PyTorch: never N×M numbers at a time.

Similarities are computed where they are used, once in the forward and once again in the backward, in tiles of at
most ``TILE`` × ``TILE``, one for each core at a time: a batched product leaves a core with its own tile, and what
follows finds it in that core's cache.  Where the rows are the columns too, a tile above the diagonal serves its mirror
image: 4·N²·D floating-point operations forward and backward together, where autograd on the N×N matrix takes 6.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx_kernels.nt_xent.rows import EPS, Block, Rows, Skip

TILE = 512
"""Rows and columns of a tile at most: 1 MB in fp32, which stays in a core's own cache while it is worked on."""

GPU_TILES = 32
"""Tiles at a time on a GPU; on a CPU there is one for each thread."""


def factors(z: Tensor) -> Tensor:
    """What scales each row of z (N, D) to length 1: (N, 1) in fp64, NaN for a row with an inf or a NaN.

    Lengths are summed in fp64, so that a row of 1e20 is a direction like any other.
    """
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(length.isinf(), torch.nan, 1 / length.clamp_min(EPS))


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what ``prepare`` makes of rows of this one."""
    return torch.promote_types(dtype, torch.float32)


def kept_like(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors of the shape and dtype of the rows' scales, and of a number of each row that the backward needs."""
    per_row = rows.new_empty(len(rows), dtype=torch.float64)
    return per_row.new_empty(len(rows), 1), per_row


def inverse(temperature: Tensor) -> Tensor:
    """What the functions below take for the temperature: 1/T in fp64."""
    return 1 / temperature.double()


def prepare(z1: Tensor, z2: Tensor | None = None) -> Rows:
    """The rows of [z1; z2] scaled to length 1, in fp32 (fp64 for fp64), and what has scaled them, (N, 1) in fp64."""
    z = z1 if z2 is None else torch.cat([z1, z2])
    factor, dtype = factors(z), prepared_dtype(z.dtype)
    return Rows(z.to(dtype).mul(factor.to(dtype)).contiguous(), factor)


def received(x: Tensor) -> Rows:
    """Rows that another rank prepared."""
    return Rows(x, x.new_empty(0))


def sums(
    rows: Rows, columns: Rows | None, skip: Skip, inverse_temperature: Tensor, shift_free: bool
) -> tuple[Tensor, ...]:
    """What ``finish`` takes of a block of columns, None for the rows themselves: here, the ``log_sums``."""
    named = _pairs(rows.x) if skip is None else skip
    return (log_sums(rows.x, None if columns is None else columns.x, named, inverse_temperature, shift_free),)


def finish(
    rows: Rows,
    columns: Rows | None,
    skip: Skip,
    all_sums: Sequence[tuple[Tensor, ...]],
    inverse_temperature: Tensor,
    shift_free: bool,  # noqa: ARG001  (the logarithms are there either way)
) -> tuple[Tensor, Tensor, Tensor]:
    """From the sums over negatives, a block of columns at a time, to the loss; the positives are among ``columns``.

    Returns (mean loss (), softmax's denominator of each row, with the positive in it, as ``gradient`` takes it (N,),
    1 - softmax (N,)); here the logarithm, both in fp64.
    """
    positive = (_pairs(rows.x) if skip is None else skip)[1]
    log_negatives = all_sums[0][0]
    for (more,) in all_sums[1:]:
        log_negatives = torch.logaddexp(log_negatives, more)
    u = (rows if columns is None else columns).x[positive]
    logit = torch.linalg.vecdot(rows.x, u).double() * inverse_temperature
    margin = log_negatives - logit
    # softplus with its threshold: log1p(exp(x)) is x to fp64's last bit from 40 on.
    loss = F.softplus(margin, threshold=40).mean().to(u.dtype)
    return loss, torch.logaddexp(log_negatives, logit), margin.sigmoid()


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
    """The gradient (N, D) of the raw rows, in fp32 or more; of the raw columns, if asked for, of one block; and
    numbers whose sum is that of the temperature, in fp64.

    blocks: of columns; the first holds the positives.  denominators, missed: what ``finish`` returned.  upstream: the
    gradient of the loss ().
    """
    first, one = blocks[0], torch.ones_like(denominators)
    x, y = rows.x, rows.x if first.columns is None else first.columns.x
    skip = _pairs(x) if first.skip is None else first.skip
    d, dy = x, None
    for block in blocks:
        columns = None if block.columns is None else block.columns.x
        of_columns = block.denominators
        column = None if of_columns is None else (torch.ones_like(of_columns), of_columns)
        named = skip if block is first else block.skip or ()
        row = (one, denominators)
        part, dy = gradients(x, columns, named, inverse_temperature, shift_free, row, column, columns_too)
        d = part if block is first else d.add_(part)
    pull = missed + missed[skip[1]] if first.columns is None else missed
    d.addcmul_(pull[:, None].to(d.dtype), y[skip[1]], value=-1)
    scale = upstream.double() * inverse_temperature / len(x)
    if dy is not None:  # two rows may share a positive; index_put_ adds in a fixed order, index_add_ in any
        assert first.columns is not None
        dy.index_put_((skip[1],), -missed[:, None].to(d.dtype) * x, accumulate=True)
        dy, _ = through_unit_(dy, y, first.columns.scales, scale)
    d, share = through_unit_(d, x, rows.scales, scale)
    # Where the rows are the columns too, each similarity is counted in both its rows' gradients.
    return d, dy, share * inverse_temperature * (-0.5 if first.columns is None else -1.0)


def through_unit_(d: Tensor, u: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scale·d, the gradient (N, D) of the unit rows u, into that of the raw ones, which ``factor`` (N, 1) scaled.

    Returns (d, which holds it now, the sum of <scale·d_i, u_i> over rows () in fp64).
    """
    along = torch.linalg.vecdot(u, d.mul_(scale.to(d.dtype)))[:, None]
    # A row shorter than EPS was only scaled: nothing is projected out.
    d.addcmul_(u, torch.where(factor < 1 / EPS, along, 0), value=-1).mul_(factor.to(d.dtype))
    return d, along.double().sum()


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    own = torch.arange(len(x), device=x.device)
    return own, (own + len(x) // 2) % len(x)


def log_sums(
    x: Tensor, y: Tensor | None, skip: Sequence[Tensor], inverse_temperature: Tensor, shift_free: bool
) -> Tensor:
    """log sum over j of exp(x_i·y_j / T) for each row i: (N,) in fp64, -inf for an empty sum.

    x: (N, D) unit rows.  y: (M, D) unit columns, or None for x itself; then ``skip`` must be symmetric.
    skip: (N,) int64 each: a column that row i leaves out, or -1.
    inverse_temperature: (), 1/T.  shift_free: whether exp(1/T) · M is known to fit the dtype; else the largest
    exponent is taken out of each sum.
    """
    total = torch.full((len(x),), 0.0 if shift_free else -torch.inf, device=x.device, dtype=torch.float64)
    blocks = _Blocks(total)
    for rows, cols, tiles, left_out in _similarities(x, y, skip, inverse_temperature):
        if shift_free:
            tiles.exp_()
        for at in left_out:
            _fill(tiles, at, 0.0 if shift_free else -torch.inf)
        _add(blocks[rows], tiles, 2, shift_free)
        if y is None and rows != cols:
            _add(blocks[cols], tiles, 1, shift_free)
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
    dx = torch.zeros_like(x)
    dy = dx if y is None else torch.zeros_like(y) if columns_too else None
    other = row if y is None else column
    by_row = _weights(row, x.dtype, shift_free)
    by_column = [] if other is None else _weights(other, x.dtype, shift_free)
    down, across = _Blocks(x), _Blocks(x if y is None else y)
    d_down, d_across = _Blocks(dx), None if dy is None else _Blocks(dy)
    memory = x.new_empty(down.most(across))
    for rows, cols, tiles, left_out in _similarities(x, y, skip, inverse_temperature):
        spare = memory[: tiles.numel()].view_as(tiles)
        in_row = [v[rows][:, :, None] for v in by_row]
        _weigh(tiles, spare, in_row, [v[cols][:, None] for v in by_column], shift_free)
        for at in left_out:
            _fill(tiles, at, 0.0)
        d_down[rows].baddbmm_(tiles, across[cols])
        if d_across is not None and not (y is None and rows == cols):
            d_across[cols].baddbmm_(tiles.mT, down[rows])
    return dx, None if y is None else dy


def tiles_at_once(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else GPU_TILES


def side(length: int, at_once: int) -> int:
    """The size of blocks of ``length`` rows: one for every thread, as long as those are of half a tile at least."""
    return -(-length // max(-(-length // TILE), min(at_once, 2 * length // TILE)))


class _Blocks:
    """The rows of a matrix, or the numbers of a vector, in blocks of one size and a shorter one of what is left.

    ``[i:j]``: those blocks, (j - i, side, ...), or (1, rest, ...) where i is their number, ``full``.
    """

    def __init__(self, whole: Tensor) -> None:
        length = len(whole)
        self.at_once = tiles_at_once(whole.device)
        self.side = side(length, self.at_once)
        self.full = length // self.side
        self.stack = whole[: self.full * self.side].view(self.full, self.side, *whole.shape[1:])
        self.short = whole[self.full * self.side :][None]

    def __getitem__(self, at: slice) -> Tensor:
        return self.short if at.start == self.full else self.stack[at]

    def short_one(self) -> list[slice]:
        return [slice(self.full, self.full + 1)] if self.short.numel() else []

    def most(self, other: "_Blocks") -> int:
        """The numbers of the similarities computed at a time, at most."""
        return min(self.at_once, self.full, other.full) * self.side * other.side


def _similarities(
    x: Tensor, y: Tensor | None, skip: Sequence[Tensor], scale: Tensor
) -> Iterator[tuple[slice, slice, Tensor, list[Tensor]]]:
    """(blocks of rows, of columns, their tiles, what is left out there) until all of scale · x @ y.T was there.

    tiles: (B, R, C), of each of the blocks of rows with that of columns.  They are the same memory each time: what it
    held before is gone.  y None: of x @ x.T those on and above the diagonal only.
    left out: for each of ``skip`` that points there, where in each row (B, R); beyond the tile where elsewhere.
    """
    down, across = _Blocks(x * scale.to(x.dtype)), _Blocks(x if y is None else y)
    known = [_pointed_at(index, down, across) for index in skip]
    blocks = [_Blocks(index) for index in skip]
    memory = x.new_empty(down.most(across))
    for rows, cols in _batches(down, across, y is None):
        a, b = down[rows], across[cols]
        shape = len(a), a.shape[1], b.shape[1]
        tiles = torch.bmm(a, b.mT, out=memory[: math.prod(shape)].view(shape))
        pairs = [(rows.start + k, cols.start + k) for k in range(len(a))]
        here = [index[rows] for index, at in zip(blocks, known, strict=True) if at is None or not at.isdisjoint(pairs)]
        if here:
            first = torch.arange(cols.start, cols.stop, device=x.device)[:, None] * across.side
            here = [index - first for index in here]
        yield rows, cols, tiles, here


def _batches(down: _Blocks, across: _Blocks, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and of columns to take at a time: along diagonals, where no two share a row or a column."""
    for offset in range(0 if symmetric else 1 - down.full, across.full):
        last = min(down.full, across.full - offset)
        for i in range(max(0, -offset), last, down.at_once):
            j = min(i + down.at_once, last)
            yield slice(i, j), slice(i + offset, j + offset)
    for cols in across.short_one():
        yield from ((slice(i, i + 1), cols) for i in range(down.full))
    for rows in down.short_one():
        if not symmetric:
            yield from ((rows, slice(j, j + 1)) for j in range(across.full))
        yield from ((rows, cols) for cols in across.short_one())


def _pointed_at(index: Tensor, down: _Blocks, across: _Blocks) -> set[tuple[int, int]] | None:
    """The numbers (row, column) of the tiles in which a row's column ``index`` is; None on a GPU: we do not wait."""
    if index.device.type != "cpu":
        return None
    row, column = torch.arange(len(index)) // down.side, index.clamp(0) // across.side  # -1 is looked for in vain
    found = torch.zeros(down.full + 1, across.full + 1, dtype=torch.bool).numpy()
    found[row.numpy(), column.numpy()] = True
    i, j = found.nonzero()
    return set(zip(i.tolist(), j.tolist(), strict=True))


def _fill(tiles: Tensor, at: Tensor, value: float) -> None:
    """Write the value in each row of (B, R, C) at column ``at`` (B, R), if there is one; waits for no device."""
    width = tiles.shape[2]
    inside = ((at >= 0) & (at < width))[:, :, None]
    at = at.clamp(0, width - 1)[:, :, None]
    tiles.scatter_(2, at, tiles.gather(2, at).masked_fill_(inside, value))


def _add(total: Tensor, tiles: Tensor, dim: int, shift_free: bool) -> None:
    """Merge the tiles' sums along ``dim`` into the totals so far, which are logarithms unless ``shift_free``."""
    if shift_free:
        total += tiles.sum(dim)
    else:
        total.copy_(torch.logaddexp(total, tiles.logsumexp(dim).double()))


def _weights(pair: tuple[Tensor, Tensor], dtype: torch.dtype, shift_free: bool) -> list[_Blocks]:
    """What ``_weigh`` multiplies by and, unless ``shift_free``, takes off the exponent."""
    g, log_sum = pair[0].double(), pair[1].double()
    both = [g * (-log_sum).exp()] if shift_free else [g, log_sum]
    return [_Blocks(v.to(dtype)) for v in both]


def _weigh(tiles: Tensor, spare: Tensor, row: list[Tensor], column: list[Tensor], shift_free: bool) -> None:
    """tiles s -> g_i·exp(s - L_i) + h_j·exp(s - C_j), in place.  row, column: (B, R, 1), (B, 1, C) or [] for h = 0."""
    if shift_free:
        tiles.exp_().mul_(torch.add(row[0], column[0], out=spare) if column else row[0])
    elif column:
        torch.sub(tiles, row[1], out=spare).exp_().mul_(row[0])
        tiles.sub_(column[1]).exp_().mul_(column[0]).add_(spare)
    else:
        tiles.sub_(row[1]).exp_().mul_(row[0])
