"""NT-Xent's sums and gradients in plain PyTorch, tile by tile, so that no N×M matrix exists.

Similarities are computed where they are used, once in the forward and again in the backward, in tiles of at most
``TILE`` × ``TILE``, one per core at a time.  In a batched product each core computes its own tile, so the following
operators find the tile in that core's cache.  If the rows are the columns too, a tile above the diagonal also serves as
its mirror image: forward and backward together take 4·N²·D floating-point operations instead of the 6·N²·D of autograd
on the N×N matrix.  See ``op`` for the formula and the names.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx_kernels.nt_xent.rows import EPS, Block, Excluded, Rows

TILE = 512
"""Maximum number of rows and of columns in a tile.  This is 1 MB in fp32, which stays in a core's own cache."""

GPU_TILES = 32
"""Number of tiles at a time on a GPU.  On a CPU it is the number of threads."""


def inverse_lengths(z: Tensor) -> Tensor:
    """Return 1 / max(|z_i|, EPS) of each row of z (N, D): (N, 1) in fp64, NaN for a row with an inf or a NaN.

    Squares are summed in fp64, in which those of a row of 1e20 do not overflow.
    """
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(length.isinf(), torch.nan, 1 / length.clamp_min(EPS))


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of prepared rows for raw rows of this dtype."""
    return torch.promote_types(dtype, torch.float32)


def saved_like(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors like the scales of ``rows`` and like the numbers per row (N,) that the backward needs."""
    per_row = rows.new_empty(len(rows), dtype=torch.float64)
    return per_row.new_empty(len(rows), 1), per_row


def inverse(temperature: Tensor) -> Tensor:
    """Return 1/T in fp64, which the functions below take as ``inverse_temperature``."""
    return 1 / temperature.double()


def prepare(z1: Tensor, z2: Tensor | None = None) -> Rows:
    """Scale the rows of [z1; z2] to length 1, in fp32 (fp64 for fp64).  Their scales are 1 / |z|, (N, 1) in fp64."""
    z = z1 if z2 is None else torch.cat([z1, z2])
    inverse_length, dtype = inverse_lengths(z), prepared_dtype(z.dtype)
    return Rows(z.to(dtype).mul(inverse_length.to(dtype)).contiguous(), inverse_length)


def prepare_received(x: Tensor) -> Rows:
    """Return rows x (N, D) that another rank has prepared as ``Rows``."""
    return Rows(x, x.new_empty(0))


def sums(
    rows: Rows, columns: Rows | None, excluded: Excluded, inverse_temperature: Tensor, shift_free: bool
) -> tuple[Tensor, ...]:
    """Return each row's sum over the negatives in one block of columns, in the form that ``loss_from_sums`` takes.

    Here this is a tuple of log sum_j exp(s_ij / T), (N,).  columns: None for the rows themselves.
    """
    excluded_columns = _pairs(rows.x) if excluded is None else excluded
    y = None if columns is None else columns.x
    return (log_sums(rows.x, y, excluded_columns, inverse_temperature, shift_free),)


def loss_from_sums(
    rows: Rows,
    columns: Rows | None,
    excluded: Excluded,
    all_sums: Sequence[tuple[Tensor, ...]],
    inverse_temperature: Tensor,
    shift_free: bool,  # noqa: ARG001  (sums are logarithms in either case)
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss from the sums over negatives.

        loss_i = softplus(log l_i - s_ip / T),  log L_i = logaddexp(log l_i, s_ip / T)

    columns: the block that holds the positives.  all_sums: the results of ``sums`` for all blocks of columns.
    Returns the mean loss (), denominators and negative_probs, both (N,) in fp64.  Here denominators are log L_i.
    """
    positive = (_pairs(rows.x) if excluded is None else excluded)[1]
    log_negatives = all_sums[0][0]
    for (log_block,) in all_sums[1:]:
        log_negatives = torch.logaddexp(log_negatives, log_block)
    u = (rows if columns is None else columns).x[positive]
    logit = torch.linalg.vecdot(rows.x, u).double() * inverse_temperature
    margin = log_negatives - logit
    # From the threshold 40 on, log1p(exp(x)) equals x in fp64.
    loss = F.softplus(margin, threshold=40).mean().to(u.dtype)
    return loss, torch.logaddexp(log_negatives, logit), margin.sigmoid()


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
    """Return the gradients of the loss.

        gradient of u_i = 1 / (N T) · [sum_j exp(s_ij / T) (1/L_i + 1/L_j) u_j - pull_i u_p]

    u: unit rows.  p: the positive of row i.  pull: the negative_probs of row i and, if p is a row as well, of row p.
    The term 1/L_j is there if column j is a row of the loss as well, with its own denominator.

    blocks: of columns; the first one holds the positives.
    denominators, negative_probs: results of ``loss_from_sums``.  upstream: the gradient of the loss ().
    Returns the gradient of the raw rows (N, D) in at least fp32; that of the raw columns (M, D) of the only block, if
    ``needs_columns``; and numbers in fp64 whose sum is the gradient of the temperature.
    """
    first = blocks[0]
    x, y = rows.x, rows.x if first.columns is None else first.columns.x
    excluded = _pairs(x) if first.excluded is None else first.excluded
    row = (torch.ones_like(denominators), denominators)
    d, dy = x, None
    for block in blocks:
        columns = None if block.columns is None else block.columns.x
        column = None if block.denominators is None else (torch.ones_like(block.denominators), block.denominators)
        block_excluded = excluded if block is first else block.excluded or ()
        d_block, dy = gradients(x, columns, block_excluded, inverse_temperature, shift_free, row, column, needs_columns)
        d = d_block if block is first else d.add_(d_block)
    pull = negative_probs + negative_probs[excluded[1]] if first.columns is None else negative_probs
    d.addcmul_(pull[:, None].to(d.dtype), y[excluded[1]], value=-1)
    scale = upstream.double() * inverse_temperature / len(x)
    if dy is not None:  # two rows may share a positive, and only index_put_ adds in a fixed order, unlike index_add_
        assert first.columns is not None
        dy.index_put_((excluded[1],), -negative_probs[:, None].to(d.dtype) * x, accumulate=True)
        dy, _ = to_raw_gradient_(dy, y, first.columns.scales, scale)
    d, along = to_raw_gradient_(d, x, rows.scales, scale)
    # Halved if the rows are the columns too, because each similarity counts in the gradients of both its rows.
    return d, dy, along * inverse_temperature * (-0.5 if first.columns is None else -1.0)


def to_raw_gradient_(d: Tensor, u: Tensor, inverse_length: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Turn scale·d, the gradient (N, D) of the unit rows u, into the gradient of the raw rows, in place.

        raw_i = inverse_length_i · (scale·d_i - <scale·d_i, u_i> u_i)

    inverse_length: (N, 1), the factors that scaled the raw rows to length 1.
    Returns d, which holds the result, and the sum of <scale·d_i, u_i> over the rows, () in fp64.
    """
    along = torch.linalg.vecdot(u, d.mul_(scale.to(d.dtype)))[:, None]
    # A row shorter than EPS was scaled by a constant, so its gradient has no component to project out.
    d.addcmul_(u, torch.where(inverse_length < 1 / EPS, along, 0), value=-1).mul_(inverse_length.to(d.dtype))
    return d, along.double().sum()


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (self_column, positive_column) of rows [z1; z2] that are the columns too."""
    own = torch.arange(len(x), device=x.device)
    return own, (own + len(x) // 2) % len(x)


def log_sums(
    x: Tensor, y: Tensor | None, excluded: Sequence[Tensor], inverse_temperature: Tensor, shift_free: bool
) -> Tensor:
    """Return log sum_j exp(x_i·y_j / T) for each row i: (N,) in fp64, -inf for an empty sum.

    x: (N, D) unit rows.  y: (M, D) unit columns, or None for x itself; then ``excluded`` must be symmetric.
    excluded: tensors (N,) int64, each with a column that row i excludes, or -1.
    inverse_temperature: 1/T, ().
    shift_free: whether exp(1/T) · M is known to fit the dtype.  Otherwise the largest exponent is subtracted.
    """
    total = torch.full((len(x),), 0.0 if shift_free else -torch.inf, device=x.device, dtype=torch.float64)
    blocks = _Blocks(total)
    for rows, cols, tiles, excluded_in_tiles in _similarities(x, y, excluded, inverse_temperature):
        if shift_free:
            tiles.exp_()
        for column in excluded_in_tiles:
            _fill(tiles, column, 0.0 if shift_free else -torch.inf)
        _add(blocks[rows], tiles, 2, shift_free)
        if y is None and rows != cols:
            _add(blocks[cols], tiles, 1, shift_free)
    return total.log_() if shift_free else total


def gradients(
    x: Tensor,
    y: Tensor | None,
    excluded: Sequence[Tensor],
    inverse_temperature: Tensor,
    shift_free: bool,
    row: tuple[Tensor, Tensor],
    column: tuple[Tensor, Tensor] | None,
    needs_columns: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return T times the gradient of sum_i g_i·L_i + sum_j h_j·C_j with respect to x (N, D) and, if needed, y (M, D).

        gradient of x_i = sum_j [g_i exp(s_ij / T - L_i) + h_j exp(s_ij / T - C_j)] y_j,  s_ij = x_i·y_j

    L, C: the ``log_sums`` of the rows over the columns, and of the columns over the rows.
    row: (g, L), (N,) each.  column: (h, C), (M,) each, or None for h = 0.  If y is None, rows and columns are the same,
      and ``column`` is not used.
    """
    dx = torch.zeros_like(x)
    if y is None:
        dy, column = dx, row
    else:
        dy = torch.zeros_like(y) if needs_columns else None
    row_weights = _weights(row, x.dtype, shift_free)
    column_weights = [] if column is None else _weights(column, x.dtype, shift_free)
    down, across = _Blocks(x), _Blocks(x if y is None else y)
    d_down, d_across = _Blocks(dx), None if dy is None else _Blocks(dy)
    memory = x.new_empty(down.max_batch_numel(across))
    for rows, cols, tiles, excluded_in_tiles in _similarities(x, y, excluded, inverse_temperature):
        spare = memory[: tiles.numel()].view_as(tiles)
        in_row = [v[rows][:, :, None] for v in row_weights]
        _weigh(tiles, spare, in_row, [v[cols][:, None] for v in column_weights], shift_free)
        for excluded_column in excluded_in_tiles:
            _fill(tiles, excluded_column, 0.0)
        d_down[rows].baddbmm_(tiles, across[cols])
        if d_across is not None and not (y is None and rows == cols):
            d_across[cols].baddbmm_(tiles.mT, down[rows])
    return dx, None if y is None else dy


def max_parallel_tiles(device: torch.device) -> int:
    """Return the number of tiles that are computed at a time."""
    return torch.get_num_threads() if device.type == "cpu" else GPU_TILES


def block_side(length: int, max_parallel: int) -> int:
    """Return the size of blocks of ``length`` rows: one block per thread, unless these were under half a tile."""
    return -(-length // max(-(-length // TILE), min(max_parallel, 2 * length // TILE)))


class _Blocks:
    """The rows of a matrix or the numbers of a vector in ``num_full`` blocks of equal size and a shorter last one.

    ``blocks[i:j]`` is (j - i, side, ...), or (1, rest, ...), the short block, if i is ``num_full``.
    """

    def __init__(self, whole: Tensor) -> None:
        length = len(whole)
        self.max_parallel = max_parallel_tiles(whole.device)
        self.side = block_side(length, self.max_parallel)
        self.num_full = length // self.side
        self.full = whole[: self.num_full * self.side].view(self.num_full, self.side, *whole.shape[1:])
        self.short = whole[self.num_full * self.side :][None]

    def __getitem__(self, blocks: slice) -> Tensor:
        return self.short if blocks.start == self.num_full else self.full[blocks]

    def short_slices(self) -> list[slice]:
        """Return the slice of the short block, in a list that is empty if there is none."""
        return [slice(self.num_full, self.num_full + 1)] if self.short.numel() else []

    def max_batch_numel(self, other: "_Blocks") -> int:
        """Return the largest number of similarities that are computed at a time."""
        return min(self.max_parallel, self.num_full, other.num_full) * self.side * other.side


def _similarities(
    x: Tensor, y: Tensor | None, excluded: Sequence[Tensor], scale: Tensor
) -> Iterator[tuple[slice, slice, Tensor, list[Tensor]]]:
    """Yield (blocks of rows, blocks of columns, tiles, excluded columns) until all of scale · x @ y.T was computed.

    tiles: (B, R, C), the similarities of each block of rows with its block of columns.  Each iteration overwrites them.
      If y is None, only tiles on and above the diagonal of x @ x.T are computed.
    excluded columns: for each tensor of ``excluded`` that may point into these tiles, the position in each row (B, R),
      which is outside the tile if the row excludes a column elsewhere.
    """
    down, across = _Blocks(x * scale.to(x.dtype)), _Blocks(x if y is None else y)
    tiles_of = [_tiles_with(index, down, across) for index in excluded]
    index_blocks = [_Blocks(index) for index in excluded]
    memory = x.new_empty(down.max_batch_numel(across))
    for rows, cols in _batches(down, across, y is None):
        a, b = down[rows], across[cols]
        shape = len(a), a.shape[1], b.shape[1]
        tiles = torch.bmm(a, b.mT, out=memory[: math.prod(shape)].view(shape))
        numbers = [(rows.start + k, cols.start + k) for k in range(len(a))]
        positions = [
            index[rows]
            for index, known in zip(index_blocks, tiles_of, strict=True)
            if known is None or not known.isdisjoint(numbers)
        ]
        if positions:
            first = torch.arange(cols.start, cols.stop, device=x.device)[:, None] * across.side
            positions = [index - first for index in positions]
        yield rows, cols, tiles, positions


def _batches(down: _Blocks, across: _Blocks, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of rows and of columns to compute at a time, along diagonals, so that none occurs twice in a batch.

    Results of a batch can then be added to its blocks in parallel.
    """
    for offset in range(0 if symmetric else 1 - down.num_full, across.num_full):
        last = min(down.num_full, across.num_full - offset)
        for i in range(max(0, -offset), last, down.max_parallel):
            j = min(i + down.max_parallel, last)
            yield slice(i, j), slice(i + offset, j + offset)
    for cols in across.short_slices():
        yield from ((slice(i, i + 1), cols) for i in range(down.num_full))
    for rows in down.short_slices():
        if not symmetric:
            yield from ((rows, slice(j, j + 1)) for j in range(across.num_full))
        yield from ((rows, cols) for cols in across.short_slices())


def _tiles_with(index: Tensor, down: _Blocks, across: _Blocks) -> set[tuple[int, int]] | None:
    """Return the numbers (row, column) of the tiles that hold a row's column ``index`` (N,).

    Returns None on a GPU, because reading the index would wait for the device.
    """
    if index.device.type != "cpu":
        return None
    row, column = torch.arange(len(index)) // down.side, index.clamp(0) // across.side  # -1 adds a tile needlessly
    is_used = torch.zeros(down.num_full + 1, across.num_full + 1, dtype=torch.bool).numpy()
    is_used[row.numpy(), column.numpy()] = True
    i, j = is_used.nonzero()
    return set(zip(i.tolist(), j.tolist(), strict=True))


def _fill(tiles: Tensor, column: Tensor, value: float) -> None:
    """Write ``value`` at ``column`` (B, R) of each row of tiles (B, R, C) unless it is outside, without a host sync."""
    width = tiles.shape[2]
    is_inside = ((column >= 0) & (column < width))[:, :, None]
    column = column.clamp(0, width - 1)[:, :, None]
    tiles.scatter_(2, column, tiles.gather(2, column).masked_fill_(is_inside, value))


def _add(total: Tensor, tiles: Tensor, dim: int, shift_free: bool) -> None:
    """Add the tiles' sums along ``dim`` to the totals, which are logarithms unless ``shift_free``."""
    if shift_free:
        total += tiles.sum(dim)
    else:
        total.copy_(torch.logaddexp(total, tiles.logsumexp(dim).double()))


def _weights(pair: tuple[Tensor, Tensor], dtype: torch.dtype, shift_free: bool) -> list[_Blocks]:
    """Return the factors that ``_weigh`` multiplies by and, unless ``shift_free``, the shifts of its exponents."""
    g, log_sum = pair[0].double(), pair[1].double()
    weights = [g * (-log_sum).exp()] if shift_free else [g, log_sum]
    return [_Blocks(v.to(dtype)) for v in weights]


def _weigh(tiles: Tensor, spare: Tensor, row: list[Tensor], column: list[Tensor], shift_free: bool) -> None:
    """Replace similarities s by g_i·exp(s - L_i) + h_j·exp(s - C_j), in place.

    row, column: ``_weights`` as (B, R, 1) and (B, 1, C); an empty column for h = 0.  spare: memory for another tile.
    """
    if shift_free:
        tiles.exp_().mul_(torch.add(row[0], column[0], out=spare) if column else row[0])
    elif column:
        torch.sub(tiles, row[1], out=spare).exp_().mul_(row[0])
        tiles.sub_(column[1]).exp_().mul_(column[0]).add_(spare)
    else:
        tiles.sub_(row[1]).exp_().mul_(row[0])
