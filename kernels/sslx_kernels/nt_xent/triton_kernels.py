"""The two Triton kernels of ``fused``, which is to be read first.  Rows are fp16, sums fp32."""

import triton
import triton.language as tl


@triton.jit
def _rows(x, first, N, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """Rows ``first`` to ``first + BLOCK`` of x (N, D) as (BLOCK, BD), zeros past the edges; offsets fit 32 bits."""
    index, dims = tl.arange(0, BLOCK), tl.arange(0, BD)
    inside = (first + index < N)[:, None] & (dims < D)[None, :]
    return tl.load(x + tl.cast(first, tl.int64) * D + index[:, None] * D + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _similarity(xt, yt, row_scale, col_scale):
    """log2(e) · cosine / T of a tile, from raw rows (BM, BD) and columns (BD, BN)."""
    return tl.dot(xt, yt) * row_scale[:, None] * col_scale[None, :]


@triton.jit
def _left_out(rows, cols, N, M, skip, NUM_SKIP: tl.constexpr, ON_COLUMNS: tl.constexpr):
    """Where a tile's entries do not count: past the edge, or a pair that ``skip`` (NUM_SKIP, N or M) names."""
    out = (rows >= N)[:, None] | (cols >= M)[None, :]
    for k in tl.static_range(NUM_SKIP):
        if ON_COLUMNS:
            named = tl.load(skip + k * M + cols, mask=cols < M, other=-1)
            out = out | (named[None, :] == rows[:, None])
        else:
            named = tl.load(skip + k * N + rows, mask=rows < N, other=-1)
            out = out | (named[:, None] == cols[None, :])
    return out


@triton.jit
def sums_kernel(
    x, y, x_scale, y_scale, skip, inverse_temperature, part_sum, part_max,
    N, M,
    D: tl.constexpr, NUM_SKIP: tl.constexpr, SYMMETRIC: tl.constexpr, SHIFT_FREE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PANELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums over TILES·BN columns for PANELS·BM rows; if SYMMETRIC also those of its mirror image."""
    block_row, block_col = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC:
        if block_col < block_row:
            return
    scale = tl.load(inverse_temperature) * 1.4426950408889634
    numbers = tl.arange(0, TILES)
    mirror = tl.zeros([TILES, BN], tl.float32)
    for panel in range(PANELS):
        first = (block_row * PANELS + panel) * BM
        rows = first + tl.arange(0, BM)
        xt = _rows(x, first, N, D, BM, BD)
        row_scale = tl.load(x_scale + rows, mask=rows < N, other=0.0) * scale
        total = tl.zeros([BM], tl.float32)
        largest = tl.full([BM], float("-inf"), tl.float32)
        for t in range(TILES):
            start = (block_col * TILES + t) * BN
            cols = start + tl.arange(0, BN)
            yt = tl.load(
                y + cols.to(tl.int64)[None, :] * D + tl.arange(0, BD)[:, None],
                mask=(cols < M)[None, :] & (tl.arange(0, BD) < D)[:, None],
                other=0.0,
            )
            col_scale = tl.load(y_scale + cols, mask=cols < M, other=0.0)
            s = _similarity(xt, yt, row_scale, col_scale)
            out = _left_out(rows, cols, N, M, skip, NUM_SKIP, False)
            if SHIFT_FREE:
                e = tl.where(out, 0.0, tl.exp2(s))
                total += tl.sum(e, 1)
                if SYMMETRIC:
                    mirror += tl.where((numbers == t)[:, None], tl.sum(e, 0)[None, :], 0.0)
            else:
                s = tl.where(out, float("-inf"), s)
                new = tl.maximum(largest, tl.max(s, 1))
                shift = tl.where(new == float("-inf"), 0.0, new)
                total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
                largest = new
        tl.store(part_sum + block_col.to(tl.int64) * N + rows, total, mask=rows < N)
        if not SHIFT_FREE:
            tl.store(part_max + block_col.to(tl.int64) * N + rows, largest, mask=rows < N)
    if SYMMETRIC:
        if block_row != block_col:
            cols = block_col * TILES * BN + numbers[:, None] * BN + tl.arange(0, BN)[None, :]
            tl.store(part_sum + block_row.to(tl.int64) * N + cols, mirror, mask=cols < N)


@triton.jit
def gradient_kernel(
    x, y, x_scale, y_scale, skip, inverse_temperature, row_weight, row_log, col_weight, col_log, result,
    N, M,
    D: tl.constexpr, NUM_SKIP: tl.constexpr, ON_COLUMNS: tl.constexpr, SHIFT_FREE: tl.constexpr,
    HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, BOOST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BM rows' gradients: sum over all columns of (g_i·exp(s - L_i) + h_j·exp(s - C_j)) · unit column j."""
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    scale = tl.load(inverse_temperature) * 1.4426950408889634
    xt = _rows(x, first, N, D, BM, BD)
    row_scale = tl.load(x_scale + rows, mask=rows < N, other=0.0) * scale
    if HAS_ROW:
        g = tl.load(row_weight + rows, mask=rows < N, other=0.0)
        if not SHIFT_FREE:
            log_row = tl.load(row_log + rows, mask=rows < N, other=0.0)
    total = tl.zeros([BM, BD], tl.float32)
    for start in range(0, M, BN):
        cols = start + tl.arange(0, BN)
        yt = _rows(y, start, M, D, BN, BD)
        col_scale = tl.load(y_scale + cols, mask=cols < M, other=0.0)
        s = _similarity(xt, tl.trans(yt), row_scale, col_scale)
        if HAS_COL:
            h = tl.load(col_weight + cols, mask=cols < M, other=0.0)
        if SHIFT_FREE:
            if HAS_ROW and HAS_COL:
                w = g[:, None] + h[None, :]
            elif HAS_ROW:
                w = g[:, None]
            else:
                w = h[None, :]
            w = tl.exp2(s) * w
        else:
            w = tl.zeros([BM, BN], tl.float32)
            if HAS_ROW:
                w += g[:, None] * tl.exp2(s - log_row[:, None])
            if HAS_COL:
                log_col = tl.load(col_log + cols, mask=cols < M, other=0.0)
                w += h[None, :] * tl.exp2(s - log_col[None, :])
        out = _left_out(rows, cols, N, M, skip, NUM_SKIP, ON_COLUMNS)
        w = tl.where(out, 0.0, w * (col_scale * BOOST)[None, :])
        total = tl.dot(w.to(yt.dtype), yt, total)
    index, dims = tl.arange(0, BM), tl.arange(0, BD)
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    at = result + tl.cast(first, tl.int64) * D + index[:, None] * D + dims[None, :]
    tl.store(at, total / BOOST, mask=inside)
