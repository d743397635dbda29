"""The Triton kernels of ``fused``, which is to be read first.  Prepared rows are fp16, sums fp32.

NAMED says which columns row i leaves out of its sum: "none"; "given", ``self_column`` and ``positive_column`` (N,), -1
for no column; or "pairs", column i and column (i + N/2) mod N.
"""

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
def _exponent_scale(temperature):
    """log2(e) / T in fp32, of T in any float dtype."""
    return (1.0 / tl.load(temperature).to(tl.float64)).to(tl.float32) * 1.4426950408889634


@triton.jit
def _positive(rows, positive_column, N, NAMED: tl.constexpr):
    """The column that is each row's positive, -1 past the edge."""
    if NAMED == "pairs":
        return tl.where(rows < N, tl.where(rows < N // 2, rows + N // 2, rows - N // 2), -1)
    else:
        return tl.load(positive_column + rows, mask=rows < N, other=-1).to(tl.int32)


@triton.jit
def _itself(rows, self_column, N, NAMED: tl.constexpr):
    """The column that is each row itself, -1 for none and past the edge."""
    if NAMED == "pairs":
        return tl.where(rows < N, rows, -1)
    else:
        return tl.load(self_column + rows, mask=rows < N, other=-1).to(tl.int32)


@triton.jit
def _left_out(rows, cols, N, M, self_column, positive_column, NAMED: tl.constexpr, ON_COLUMNS: tl.constexpr):
    """Where a tile's entries do not count: past the edge, or a pair that NAMED names (of columns if ON_COLUMNS)."""
    out = (rows >= N)[:, None] | (cols >= M)[None, :]
    if NAMED != "none":
        if ON_COLUMNS:
            out = out | (_itself(cols, self_column, M, NAMED)[None, :] == rows[:, None])
            out = out | (_positive(cols, positive_column, M, NAMED)[None, :] == rows[:, None])
        else:
            out = out | (_itself(rows, self_column, N, NAMED)[:, None] == cols[None, :])
            out = out | (_positive(rows, positive_column, N, NAMED)[:, None] == cols[None, :])
    return out


@triton.jit
def _named_ranges(first_row, rows, self_column, positive_column, N, NAMED: tl.constexpr, BM: tl.constexpr):
    """(first, last) of the columns that these rows leave out: themselves, then their positives; last < first if none"""
    if NAMED == "none":
        return 2147483647, -1, 2147483647, -1
    elif NAMED == "pairs":
        half = N // 2
        if first_row + BM <= half:
            first, last = first_row + half, first_row + half + BM - 1
        elif first_row >= half:
            first, last = first_row - half, first_row - half + BM - 1
        else:  # rows of both views
            first, last = 0, N - 1
        return first_row, first_row + BM - 1, first, last
    else:
        own, positive = _itself(rows, self_column, N, NAMED), _positive(rows, positive_column, N, NAMED)
        own_first = tl.min(tl.where(own < 0, 2147483647, own), 0)
        positive_first = tl.min(tl.where(positive < 0, 2147483647, positive), 0)
        return own_first, tl.max(own, 0), positive_first, tl.max(positive, 0)


@triton.jit
def _touches(start, end, end_row, N, M, own_first, own_last, positive_first, positive_last):
    """Whether columns ``start`` to ``end`` of these rows cross an edge or may hold one that is left out."""
    edge = (end > M) | (end_row > N)
    own = (own_first < end) & (own_last >= start)
    return edge | own | ((positive_first < end) & (positive_last >= start))


@triton.jit
def sums_kernel(
    x, y, x_scale, y_scale, self_column, positive_column, temperature, part_sum, part_max,
    N, M,
    D: tl.constexpr, NAMED: tl.constexpr, SYMMETRIC: tl.constexpr, SHIFT_FREE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PANELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums over TILES·BN columns for PANELS·BM rows; if SYMMETRIC also those of its mirror image."""
    block_row, block_col = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC:
        if block_col < block_row:
            return
    scale = _exponent_scale(temperature)
    numbers = tl.arange(0, TILES)
    mirror = tl.zeros([BN, TILES], tl.float32)
    for panel in range(PANELS):
        first = (block_row * PANELS + panel) * BM
        rows = first + tl.arange(0, BM)
        xt = _rows(x, first, N, D, BM, BD)
        row_scale = tl.load(x_scale + rows, mask=rows < N, other=0.0) * scale
        own, own_last, positive, positive_last = _named_ranges(first, rows, self_column, positive_column, N, NAMED, BM)
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
            s = _similarity(xt, yt, row_scale, tl.load(y_scale + cols, mask=cols < M, other=0.0))
            masked = _touches(start, start + BN, first + BM, N, M, own, own_last, positive, positive_last)
            if SHIFT_FREE:
                e = tl.exp2(s)
                if masked:
                    e = tl.where(_left_out(rows, cols, N, M, self_column, positive_column, NAMED, False), 0.0, e)
                total += tl.sum(e, 1)
                if SYMMETRIC:
                    mirror += tl.where((numbers == t)[None, :], tl.sum(e, 0)[:, None], 0.0)
            else:
                if masked:
                    out = _left_out(rows, cols, N, M, self_column, positive_column, NAMED, False)
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
            cols = block_col * TILES * BN + numbers[None, :] * BN + tl.arange(0, BN)[:, None]
            tl.store(part_sum + block_row.to(tl.int64) * N + cols, mirror, mask=cols < N)


@triton.jit
def gradient_kernel(
    x, y, x_scale, y_scale, self_column, positive_column, temperature, of_row, of_col, result,
    N, M, part_columns,
    D: tl.constexpr, NAMED: tl.constexpr, ON_COLUMNS: tl.constexpr, SHIFT_FREE: tl.constexpr,
    HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, BOOST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BM rows' gradients: sum over a part of the columns of (exp(s - L_i) + exp(s - C_j)) · unit column j.

    of_row, of_col: exp(-L), exp(-C) if SHIFT_FREE, else L and C over log(2).  result: (parts, N, D).
    """
    first, part = tl.program_id(0) * BM, tl.program_id(1)
    rows = first + tl.arange(0, BM)
    scale = _exponent_scale(temperature)
    xt = _rows(x, first, N, D, BM, BD)
    row_scale = tl.load(x_scale + rows, mask=rows < N, other=0.0) * scale
    own, own_last, positive, positive_last = _named_ranges(
        first, rows, self_column, positive_column, N, "none" if ON_COLUMNS else NAMED, BM
    )
    if HAS_ROW:
        g = tl.load(of_row + rows, mask=rows < N, other=0.0)
    total = tl.zeros([BM, BD], tl.float32)
    for start in range(part * part_columns, tl.minimum(M, (part + 1) * part_columns), BN):
        cols = start + tl.arange(0, BN)
        yt = _rows(y, start, M, D, BN, BD)
        col_scale = tl.load(y_scale + cols, mask=cols < M, other=0.0)
        s = _similarity(xt, tl.trans(yt), row_scale, col_scale)
        if HAS_COL:
            h = tl.load(of_col + cols, mask=cols < M, other=0.0)
        if SHIFT_FREE:
            if HAS_ROW and HAS_COL:
                w = tl.exp2(s) * (g[:, None] + h[None, :])
            elif HAS_ROW:
                w = tl.exp2(s) * g[:, None]
            else:
                w = tl.exp2(s) * h[None, :]
        else:
            w = tl.zeros([BM, BN], tl.float32)
            if HAS_ROW:
                w += tl.exp2(s - g[:, None])
            if HAS_COL:
                w += tl.exp2(s - h[None, :])
        w = w * (col_scale * BOOST)[None, :]
        masked = _touches(start, start + BN, first + BM, N, M, own, own_last, positive, positive_last)
        if masked or (ON_COLUMNS and NAMED != "none"):
            w = tl.where(_left_out(rows, cols, N, M, self_column, positive_column, NAMED, ON_COLUMNS), 0.0, w)
        total = tl.dot(w.to(yt.dtype), yt, total)
    index, dims = tl.arange(0, BM), tl.arange(0, BD)
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    at = result + (tl.cast(part, tl.int64) * N + first) * D + index[:, None] * D + dims[None, :]
    tl.store(at, total / BOOST, mask=inside)


@triton.jit
def prepare_kernel(
    z1, z2, x, scales,
    N1, N, stride1, stride2,
    D: tl.constexpr, EPS: tl.constexpr, STORE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BM rows of [z1; z2] at lengths of 64 to 128 (x, if STORE); what brings x and z to length 1 (scales (2, N))."""
    rows, dims = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BD)
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    wide = rows.to(tl.int64)[:, None]
    z = tl.load(z1 + wide * stride1 + dims[None, :], mask=inside & (rows < N1)[:, None], other=0.0).to(tl.float32)
    z += tl.load(z2 + (wide - N1) * stride2 + dims[None, :], mask=inside & (rows >= N1)[:, None], other=0.0).to(
        tl.float32
    )
    if STORE:
        square = z.to(tl.float64) * z.to(tl.float64)
        length = tl.sqrt(tl.sum(square, 1))
        # 2^(6 - e) for a length in [2^e, 2^(e + 1)): its exponent's bits, so exact.
        bits = ((1023 + 1023 + 6 - (length.to(tl.int64, bitcast=True) >> 52)) << 52).to(tl.float64, bitcast=True)
        power = tl.where(length > EPS, bits, 0.0)
        bad = (length == float("inf")) | (length != length)
        power = tl.where(bad, float("nan"), power).to(tl.float32)
        z = (z * power[:, None]).to(x.dtype.element_ty)
        tl.store(x + wide * D + dims[None, :], z, mask=inside)
        factor = 1.0 / tl.where(length > EPS, length, EPS)
        tl.store(scales + N + rows, tl.where(bad, float("nan"), factor).to(tl.float32), mask=rows < N)
    prepared = z.to(tl.float64)
    length = tl.sqrt(tl.sum(prepared * prepared, 1))
    tl.store(scales + rows, tl.where(length == 0, 0.0, 1.0 / length).to(tl.float32), mask=rows < N)


@triton.jit
def loss_kernel(
    x, y, x_scale, y_scale, positive_column, temperature, part_sum, part_max, denominators, missed, losses,
    N, parts,
    D: tl.constexpr, NAMED: tl.constexpr, SHIFT_FREE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """From the parts of the sums over negatives (parts, N) to each row's denominator and share of the mean loss.

    losses: this block's part of the mean.  denominators: as ``gradient_kernel`` takes them.  missed: 1 - softmax.
    """
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float64)
    largest = tl.full([BM], float("-inf"), tl.float64)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * N + rows
        added = tl.load(part_sum + at, mask=rows < N, other=0.0).to(tl.float64)
        if SHIFT_FREE:
            total += added
        else:
            one = tl.load(part_max + at, mask=rows < N, other=float("-inf")).to(tl.float64)
            new = tl.where(one > largest, one, largest)
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(largest - shift) + added * tl.exp2(one - shift)
            largest = new
    log_negatives = tl.log(total)
    if not SHIFT_FREE:
        log_negatives += largest * 0.6931471805599453
    positive = _positive(rows, positive_column, N, NAMED).to(tl.int64)
    dims = tl.arange(0, BD)
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    # Products of fp16 are exact in fp32.
    other = tl.load(y + positive[:, None] * D + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    cosine = tl.sum((_rows(x, first, N, D, BM, BD).to(tl.float32) * other).to(tl.float64), 1)
    cosine *= tl.load(x_scale + rows, mask=rows < N, other=0.0).to(tl.float64)
    cosine *= tl.load(y_scale + positive, mask=rows < N, other=0.0).to(tl.float64)
    logit = cosine * (1.0 / tl.load(temperature).to(tl.float64))
    margin = log_negatives - logit
    e = tl.exp(-tl.abs(margin))
    one_more = 1.0 + e
    log1p = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / (one_more - 1.0)))
    loss = tl.where(margin > 0, margin, 0.0) + log1p
    tl.store(missed + rows, (1.0 / (1.0 + tl.exp(-margin))).to(tl.float32), mask=rows < N)
    log_all = logit + loss
    kept = tl.exp(-log_all) if SHIFT_FREE else log_all * 1.4426950408889634
    tl.store(denominators + rows, kept.to(tl.float32), mask=rows < N)
    tl.store(losses + tl.program_id(0), (tl.sum(tl.where(rows < N, loss, 0.0), 0) / N).to(tl.float32))


@triton.jit
def raw_gradient_kernel(
    x, y, x_scale, y_scale, factor, positive_column, temperature, gradient, missed, part_gradient, result, shares,
    N, parts,
    D: tl.constexpr, NAMED: tl.constexpr, SYMMETRIC: tl.constexpr, EPS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """From the parts of the unit rows' gradients (parts, N, D) to the raw rows': the positive's pull, the scale, the
    length.  shares: this block's part of the temperature's gradient."""
    first = tl.program_id(0) * BM
    rows, dims = first + tl.arange(0, BM), tl.arange(0, BD)
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    at = tl.cast(first, tl.int64) * D + tl.arange(0, BM)[:, None] * D + dims[None, :]
    d = tl.zeros([BM, BD], tl.float32)
    for part in range(parts):
        d += tl.load(part_gradient + tl.cast(part, tl.int64) * N * D + at, mask=inside, other=0.0)
    positive = _positive(rows, positive_column, N, NAMED).to(tl.int64)
    pull = tl.load(missed + rows, mask=rows < N, other=0.0)
    if SYMMETRIC:
        pull += tl.load(missed + positive, mask=rows < N, other=0.0)
    pull *= tl.load(y_scale + positive, mask=rows < N, other=0.0)
    d -= pull[:, None] * tl.load(y + positive[:, None] * D + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(temperature).to(tl.float64)
    d *= (tl.load(gradient).to(tl.float64) * inverse / N).to(tl.float32)
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    u *= tl.load(x_scale + rows, mask=rows < N, other=0.0)[:, None]
    along = tl.sum(u * d, 1)
    to_raw = tl.load(factor + rows, mask=rows < N, other=0.0)
    # A row shorter than EPS was only scaled: nothing is projected out.
    d = (d - u * tl.where(to_raw < 1.0 / EPS, along, 0.0)[:, None]) * to_raw[:, None]
    tl.store(result + at, d, mask=inside)
    share = tl.sum(along.to(tl.float64), 0) * inverse * (-0.5 if SYMMETRIC else -1.0)
    tl.store(shares + tl.program_id(0), share)
