"""The Triton kernels of ``fused``, which launches them.  Prepared rows are fp16 and sums fp32.

    x, y              (N, D) prepared rows and (M, D) prepared columns
    x_scale, y_scale  (N,) and (M,), their inverse lengths, so that s_ij = x_i · y_j · x_scale_i · y_scale_j
    part_sum          (parts, N), sums over the negatives of exp(s_ij / T), or of exp(s_ij / T - part_max)
    denominators      (N,), 1 / L_i if SHIFT_FREE, else log2 L_i, with L_i the softmax denominator of row i
    negative_probs    (N,), 1 - softmax_i(positive of i)

BM rows and BN columns are a tile, and rows are padded to BD numbers.  Exponents are in units of log(2), for exp2.

NAMED says which columns row i excludes from its sum: "none"; "given", which are ``self_column`` and
``positive_column``, (N,) each, -1 for no column; or "pairs", which are columns i and (i + N/2) mod N.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(x, first, N, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    """Load BLOCK rows of x (N, D) from row ``first`` on as (BLOCK, BD), zero past the edges; offsets fit in 32 bits."""
    index, dims = tl.arange(0, BLOCK), tl.arange(0, BD)
    inside = (first + index < N)[:, None] & (dims < D)[None, :]
    return tl.load(x + tl.cast(first, tl.int64) * D + index[:, None] * D + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _similarity(xt, yt, row_scale, col_scale):
    """Return s_ij · log2(e) / T of a tile, from rows (BM, BD) and columns (BD, BN); row_scale includes log2(e) / T."""
    return tl.dot(xt, yt) * row_scale[:, None] * col_scale[None, :]


@triton.jit
def _exponent_scale(temperature):
    """Return log2(e) / T in fp32, for T of any float dtype."""
    return (1.0 / tl.load(temperature).to(tl.float64)).to(tl.float32) * 1.4426950408889634


@triton.jit
def _positive_column(rows, positive_column, N, NAMED: tl.constexpr):
    """Return the column of each row's positive, -1 past the edge."""
    if NAMED == "pairs":
        return tl.where(rows < N, tl.where(rows < N // 2, rows + N // 2, rows - N // 2), -1)
    else:
        return tl.load(positive_column + rows, mask=rows < N, other=-1).to(tl.int32)


@triton.jit
def _own_column(rows, self_column, N, NAMED: tl.constexpr):
    """Return the column that holds each row itself, -1 if there is none and past the edge."""
    if NAMED == "pairs":
        return tl.where(rows < N, rows, -1)
    else:
        return tl.load(self_column + rows, mask=rows < N, other=-1).to(tl.int32)


@triton.jit
def _mask(rows, cols, N, M, self_column, positive_column, NAMED: tl.constexpr, ON_COLUMNS: tl.constexpr):
    """Return where a tile's entries are masked: past the edge, and at the columns that NAMED excludes.

    ON_COLUMNS: the indices belong to the columns, and exclude rows.
    """
    out = (rows >= N)[:, None] | (cols >= M)[None, :]
    if NAMED != "none":
        if ON_COLUMNS:
            out = out | (_own_column(cols, self_column, M, NAMED)[None, :] == rows[:, None])
            out = out | (_positive_column(cols, positive_column, M, NAMED)[None, :] == rows[:, None])
        else:
            out = out | (_own_column(rows, self_column, N, NAMED)[:, None] == cols[None, :])
            out = out | (_positive_column(rows, positive_column, N, NAMED)[:, None] == cols[None, :])
    return out


@triton.jit
def _excluded_ranges(first_row, rows, self_column, positive_column, N, NAMED: tl.constexpr, BM: tl.constexpr):
    """Return the first and last of the rows' own columns, and of their positives'; last < first if there are none."""
    if NAMED == "none":
        return 2147483647, -1, 2147483647, -1
    elif NAMED == "pairs":
        half = N // 2
        if first_row + BM <= half:
            first, last = first_row + half, first_row + half + BM - 1
        elif first_row >= half:
            first, last = first_row - half, first_row - half + BM - 1
        else:  # the block has rows of both views
            first, last = 0, N - 1
        return first_row, first_row + BM - 1, first, last
    else:
        own, positive = _own_column(rows, self_column, N, NAMED), _positive_column(rows, positive_column, N, NAMED)
        own_first = tl.min(tl.where(own < 0, 2147483647, own), 0)
        positive_first = tl.min(tl.where(positive < 0, 2147483647, positive), 0)
        return own_first, tl.max(own, 0), positive_first, tl.max(positive, 0)


@triton.jit
def _needs_mask(start, end, end_row, N, M, own_first, own_last, positive_first, positive_last):
    """Return whether a tile needs a mask: columns ``start`` to ``end`` cross an edge or may include an excluded one."""
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
    """Compute partial sums over the negatives: part_sum_i = sum_j exp(s_ij / T), over TILES·BN columns.

    A program handles PANELS·BM rows.  If SYMMETRIC, rows and columns are the same, and it adds the sums of the tile's
    mirror image as well.  Unless SHIFT_FREE, part_max_i = max_j s_ij / T is subtracted from the exponents.
    """
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
        own, own_last, positive, positive_last = _excluded_ranges(
            first, rows, self_column, positive_column, N, NAMED, BM
        )
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
            masked = _needs_mask(start, start + BN, first + BM, N, M, own, own_last, positive, positive_last)
            if SHIFT_FREE:
                e = tl.exp2(s)
                if masked:
                    e = tl.where(_mask(rows, cols, N, M, self_column, positive_column, NAMED, False), 0.0, e)
                total += tl.sum(e, 1)
                if SYMMETRIC:
                    mirror += tl.where((numbers == t)[None, :], tl.sum(e, 0)[:, None], 0.0)
            else:
                if masked:
                    out = _mask(rows, cols, N, M, self_column, positive_column, NAMED, False)
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
    """Compute parts of the unit rows' gradients: result_i = sum_j exp(s_ij / T) (1 / L_i + 1 / L_j) u_j.

    u_j: unit column j.  of_row, of_col: denominators of the rows and of the columns; without HAS_ROW or HAS_COL their
    term is left out.  A program sums over ``part_columns`` columns for BM rows.  result: (parts, N, D).
    """
    first, part = tl.program_id(0) * BM, tl.program_id(1)
    rows = first + tl.arange(0, BM)
    scale = _exponent_scale(temperature)
    xt = _rows(x, first, N, D, BM, BD)
    row_scale = tl.load(x_scale + rows, mask=rows < N, other=0.0) * scale
    own, own_last, positive, positive_last = _excluded_ranges(
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
        masked = _needs_mask(start, start + BN, first + BM, N, M, own, own_last, positive, positive_last)
        if masked or (ON_COLUMNS and NAMED != "none"):
            w = tl.where(_mask(rows, cols, N, M, self_column, positive_column, NAMED, ON_COLUMNS), 0.0, w)
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
    """Prepare BM rows: x_i = 2^k z_i with a length in [64, 128), and their scales 1 / |x_i| and 1 / |z_i|, (2, N).

    z: the rows of [z1; z2].  Without STORE, z1 is prepared already, and only 1 / |x_i| is written, (1, N).
    """
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
        # 2^(6 - e) for a length in [2^e, 2^(e + 1)), computed exactly from the bits of its exponent.
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
    x, y, x_scale, y_scale, positive_column, temperature, part_sum, part_max, denominators, negative_probs, losses,
    N, parts,
    D: tl.constexpr, NAMED: tl.constexpr, SHIFT_FREE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute loss_i = softplus(log l_i - s_ip / T) from the partial sums, whose total is l_i; p is the positive.

    losses: (blocks,), each the sum of loss_i / N over BM rows.  Also writes denominators L_i = l_i + exp(s_ip / T), and
    negative_probs l_i / L_i.
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
            part_largest = tl.load(part_max + at, mask=rows < N, other=float("-inf")).to(tl.float64)
            new = tl.where(part_largest > largest, part_largest, largest)
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(largest - shift) + added * tl.exp2(part_largest - shift)
            largest = new
    log_negatives = tl.log(total)
    if not SHIFT_FREE:
        log_negatives += largest * 0.6931471805599453
    positive = _positive_column(rows, positive_column, N, NAMED).to(tl.int64)
    dims = tl.arange(0, BD)
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    # Products of two fp16 numbers are exact in fp32.
    y_positive = tl.load(y + positive[:, None] * D + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    cosine = tl.sum((_rows(x, first, N, D, BM, BD).to(tl.float32) * y_positive).to(tl.float64), 1)
    cosine *= tl.load(x_scale + rows, mask=rows < N, other=0.0).to(tl.float64)
    cosine *= tl.load(y_scale + positive, mask=rows < N, other=0.0).to(tl.float64)
    logit = cosine * (1.0 / tl.load(temperature).to(tl.float64))
    margin = log_negatives - logit
    e = tl.exp(-tl.abs(margin))
    one_plus_e = 1.0 + e
    log1p = tl.where(one_plus_e == 1.0, e, tl.log(one_plus_e) * (e / (one_plus_e - 1.0)))  # log(1 + e), accurately
    loss = tl.where(margin > 0, margin, 0.0) + log1p
    tl.store(negative_probs + rows, (1.0 / (1.0 + tl.exp(-margin))).to(tl.float32), mask=rows < N)
    log_all = logit + loss
    denominator = tl.exp(-log_all) if SHIFT_FREE else log_all * 1.4426950408889634
    tl.store(denominators + rows, denominator.to(tl.float32), mask=rows < N)
    tl.store(losses + tl.program_id(0), (tl.sum(tl.where(rows < N, loss, 0.0), 0) / N).to(tl.float32))


@triton.jit
def raw_gradient_kernel(
    x, y, x_scale, y_scale, raw_scale, positive_column, temperature, gradient, negative_probs, part_gradient, result,
    temperature_parts,
    N, parts,
    D: tl.constexpr, NAMED: tl.constexpr, SYMMETRIC: tl.constexpr, EPS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute the raw rows' gradients from the parts of the unit rows' gradients (parts, N, D).

        d_i = gradient / (N T) · (sum of parts - pull_i u_p),  result_i = raw_scale_i (d_i - <d_i, u_i> u_i)

    pull_i: the negative_probs of row i and, if SYMMETRIC, of row p, its positive.  raw_scale: (N,), 1 / |z_i|.
    temperature_parts: (blocks,), whose sum is the temperature's gradient.
    """
    first = tl.program_id(0) * BM
    rows, dims = first + tl.arange(0, BM), tl.arange(0, BD)
    inside = (rows < N)[:, None] & (dims < D)[None, :]
    at = tl.cast(first, tl.int64) * D + tl.arange(0, BM)[:, None] * D + dims[None, :]
    d = tl.zeros([BM, BD], tl.float32)
    for part in range(parts):
        d += tl.load(part_gradient + tl.cast(part, tl.int64) * N * D + at, mask=inside, other=0.0)
    positive = _positive_column(rows, positive_column, N, NAMED).to(tl.int64)
    pull = tl.load(negative_probs + rows, mask=rows < N, other=0.0)
    if SYMMETRIC:
        pull += tl.load(negative_probs + positive, mask=rows < N, other=0.0)
    pull *= tl.load(y_scale + positive, mask=rows < N, other=0.0)
    d -= pull[:, None] * tl.load(y + positive[:, None] * D + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(temperature).to(tl.float64)
    d *= (tl.load(gradient).to(tl.float64) * inverse / N).to(tl.float32)
    u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    u *= tl.load(x_scale + rows, mask=rows < N, other=0.0)[:, None]
    along = tl.sum(u * d, 1)
    to_raw = tl.load(raw_scale + rows, mask=rows < N, other=0.0)
    # A row shorter than EPS was scaled by a constant, so its gradient has no component to project out.
    d = (d - u * tl.where(to_raw < 1.0 / EPS, along, 0.0)[:, None]) * to_raw[:, None]
    tl.store(result + at, d, mask=inside)
    temperature_part = tl.sum(along.to(tl.float64), 0) * inverse * (-0.5 if SYMMETRIC else -1.0)
    tl.store(temperature_parts + tl.program_id(0), temperature_part)
