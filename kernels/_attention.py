"""What the attention kernels share: rows of a head, which keys a query sees, dropout, the norm of queries and keys.

A head's rows are a tuple of blocks, one per power of two in WIDTHS, so that 80 columns are 64 and 16 and not 128; the
keys held on chip are a tuple of those, one per power of two in PIECES, so that 197 are 128, 64 and 16 and not 256.
"""

# ruff: noqa: RUF005 - Triton has no unpacking
from __future__ import annotations

import triton
import triton.language as tl

from ._device import LOG2E


@triton.jit
def _columns(i: tl.constexpr, WIDTHS: tl.constexpr):
    """Columns of the i-th piece, [1, WIDTH]; all but the last are equal."""
    return i * WIDTHS[0] + tl.arange(0, WIDTHS[i])[None, :]


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _zero_rows(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    x = ()
    for i in tl.static_range(len(WIDTHS)):
        x = x + (_zeros(ROWS, WIDTHS[i]),)
    return x


@triton.jit
def _zero_vector(COLUMNS: tl.constexpr):
    return tl.zeros([COLUMNS], tl.float32)


@triton.jit
def _zero_vectors(WIDTHS: tl.constexpr):
    x = ()
    for i in tl.static_range(len(WIDTHS)):
        x = x + (_zero_vector(WIDTHS[i]),)
    return x


@triton.jit
def _sequence(b, N, S, longest, cu_seqlens_ptr):
    """(batch index, first token, queries, keys) of sequence b; whatever the table holds, within the tensor."""
    batch = b
    first = 0
    if cu_seqlens_ptr is not None:
        first = min(max(tl.load(cu_seqlens_ptr + b), 0), N)
        N = min(max(tl.load(cu_seqlens_ptr + b + 1) - first, 0), min(N - first, longest))
        S = N
        batch = b * 0
    return batch, tl.cast(first, tl.int64), N, S


@triton.jit
def _in_elements(strides, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Strides that came in units of 16 bytes: the compiler looks for multiples of 16, and a head of 72 is none."""
    elements = ()
    for i in tl.static_range(3):
        stride = strides[i]
        if WIDE:
            stride = tl.cast(stride, tl.int64)
        elements = elements + (stride * UNIT,)
    return elements


@triton.jit
def _head(pointer, stride, batch, h, first):
    """Start of a head's rows, from the strides of (batch, head, token)."""
    return pointer + batch * stride[0] + h * stride[1] + first * stride[2]


@triton.jit
def _row_block(base, stride, first, limit, E: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr,
               i: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Addresses of rows first.. of column piece i, and which of them lie inside."""
    row = tl.arange(0, ROWS)  # [ROWS]
    e = _columns(i, WIDTHS)  # [1, WIDTH]
    inside = (first + row < limit)[:, None]  # [ROWS, 1]
    if i * WIDTHS[0] + WIDTHS[i] > E:
        inside = inside & (e < E)
    if WIDE:
        row = row.to(tl.int64)
    return base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + e, inside


@triton.jit
def _load_rows(base, stride, first, limit, E: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr,
               MASKED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Rows first.. of a head, 0 outside; without MASKED all of them are known to be inside."""
    x = ()
    for i in tl.static_range(len(WIDTHS)):
        block, inside = _row_block(base, stride, first, limit, E, ROWS, WIDTHS, i, WIDE)
        if MASKED or i * WIDTHS[0] + WIDTHS[i] > E:
            x = x + (tl.load(block, mask=inside, other=0.0),)
        else:
            x = x + (tl.load(block),)
    return x


@triton.jit
def _times(x, factor):
    """A block of rows times a factor, or one per row [ROWS, 1]."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (x[i] * factor,)
    return y


@triton.jit
def _store_rows(x, base, stride, first, limit, E: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr,
                WIDE: tl.constexpr):  # fmt: skip
    for i in tl.static_range(len(WIDTHS)):
        block, inside = _row_block(base, stride, first, limit, E, ROWS, WIDTHS, i, WIDE)
        tl.store(block, x[i].to(base.dtype.element_ty), mask=inside)


@triton.jit
def _product(x, y):
    """x yᵀ of two blocks of rows [X, E], [Y, E], in fp32."""
    s = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")  # [X, Y]
    for i in tl.static_range(1, len(x)):
        s = tl.dot(x[i], tl.trans(y[i]), s, input_precision="ieee")
    return s


@triton.jit
def _add_product(total, p, x):
    """total + p x for a block of rows x."""
    p = p.to(x[0].dtype)
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.dot(p, x[i], total[i], input_precision="ieee"),)
    return y


@triton.jit
def _row_dot(x, y):
    """Σ_e x y of each row, in fp32."""
    s = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), axis=1)  # [ROWS]
    for i in tl.static_range(1, len(x)):
        s += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), axis=1)
    return s


@triton.jit
def _numbers(x):
    """A block of rows with 0 in the place of what is no number: the 0 of a masked key times NaN would be NaN."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.where(tl.abs(x[i].to(tl.float32)) < float("inf"), x[i], 0.0).to(x[i].dtype),)
    return y


@triton.jit
def _kept(row, key, N, S, mask_base, stride_mask, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Which keys each query attends to; row [M, 1] and key [1, N], or the other way round."""
    keep = (row < N) & (key < S)
    if MASK == "bool":
        block = mask_base + row.to(tl.int64) * stride_mask[2] + key.to(tl.int64) * stride_mask[3]
        keep = tl.load(block, mask=keep, other=0) != 0
    if CAUSAL:
        keep = keep & (row >= key)
    return keep


@triton.jit
def _scores(x, y, row, key, N, S, scale_log2, mask_base, stride_mask, MASK: tl.constexpr, CAUSAL: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Scores x yᵀ to the base 2, -inf where a query does not attend; without MASKED all keys exist."""
    s = _product(x, y) * scale_log2
    if MASK == "additive":
        block = mask_base + row.to(tl.int64) * stride_mask[2] + key.to(tl.int64) * stride_mask[3]
        s += tl.load(block, mask=(row < N) & (key < S), other=0.0).to(tl.float32) * LOG2E
    if MASK == "bool" or CAUSAL:
        s = tl.where(_kept(row, key, N, S, mask_base, stride_mask, MASK, CAUSAL), s, float("-inf"))
    elif MASKED:
        s = tl.where(key < S, s, float("-inf"))
    return s


@triton.jit
def _survives(seed_ptr, dropout, row, key, h, b):
    """Which weights dropout keeps: Philox 4x32-10 of (key, row, head, batch), so that tile shapes do not matter."""
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), key, row, tl.cast(h, tl.int32), tl.cast(b, tl.int32))
    return tl.uint_to_uniform_float(bits) >= dropout


@triton.jit
def _standardised(x, first, limit, eps, E: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Rows of mean 0 and variance 1 in fp32, 0 outside, and 1/sqrt(variance + eps); two passes over the registers."""
    mean = tl.sum(x[0].to(tl.float32), axis=1)  # [ROWS]
    for i in tl.static_range(1, len(WIDTHS)):
        mean += tl.sum(x[i].to(tl.float32), axis=1)
    mean /= E
    centred = ()
    squares = tl.zeros([ROWS], tl.float32)
    inside = (first + tl.arange(0, ROWS) < limit)[:, None]
    for i in tl.static_range(len(WIDTHS)):
        e = _columns(i, WIDTHS)
        c = tl.where(inside & (e < E), x[i].to(tl.float32) - mean[:, None], 0.0)  # [ROWS, WIDTH]
        squares += tl.sum(c * c, axis=1)
        centred = centred + (c,)
    # a row outside would be 0 / 0 where eps is 0
    rstd = tl.where(first + tl.arange(0, ROWS) < limit, tl.rsqrt(squares / E + eps), 0.0)
    y = ()
    for i in tl.static_range(len(WIDTHS)):
        y = y + (centred[i] * rstd[:, None],)
    return y, rstd


@triton.jit
def _parameter(pointer, i: tl.constexpr, missing, E: tl.constexpr, WIDTHS: tl.constexpr):
    """Piece i of a norm's weight or bias in fp32, [1, WIDTH]."""
    e = _columns(i, WIDTHS)
    if pointer is None:
        return tl.where(e < E, missing, 0.0)
    else:
        return tl.load(pointer + e, mask=e < E, other=0.0).to(tl.float32)


@triton.jit
def _normed(x, first, limit, weight_ptr, bias_ptr, eps, E: tl.constexpr, ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """LayerNorm of a block of rows, rounded to its dtype as a separate op would; without eps the rows themselves."""
    if eps is None:
        return x
    else:
        n, _ = _standardised(x, first, limit, eps, E, ROWS, WIDTHS)
        inside = (first + tl.arange(0, ROWS) < limit)[:, None]
        y = ()
        for i in tl.static_range(len(WIDTHS)):
            affine = n[i] * _parameter(weight_ptr, i, 1.0, E, WIDTHS) + _parameter(bias_ptr, i, 0.0, E, WIDTHS)
            y = y + (tl.where(inside, affine, 0.0).to(x[i].dtype),)
        return y


@triton.jit
def _load_pieces(base, stride, first, limit, weight_ptr, bias_ptr, eps, E: tl.constexpr, PIECES: tl.constexpr,
                 FULL: tl.constexpr, WIDTHS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Rows first.. in consecutive pieces, normalised if there is an eps; the first FULL pieces lie inside."""
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        x = _load_rows(base, stride, first, limit, E, PIECES[i], WIDTHS, i >= FULL, WIDE)
        pieces = pieces + (_normed(x, first, limit, weight_ptr, bias_ptr, eps, E, PIECES[i], WIDTHS),)
        first += PIECES[i]
    return pieces


@triton.jit
def _through_norm(d, base, stride, first, limit, weight_ptr, eps, dweight, dbias, E: tl.constexpr, ROWS: tl.constexpr,
                  WIDTHS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Gradient of the rows at base from that of their LayerNorm, if there is one, and the parameters' sums so far."""
    if eps is None:
        return d, dweight, dbias
    else:
        x = _load_rows(base, stride, first, limit, E, ROWS, WIDTHS, True, WIDE)
        n, rstd = _standardised(x, first, limit, eps, E, ROWS, WIDTHS)
        g = ()
        dweights = ()
        dbiases = ()
        for i in tl.static_range(len(WIDTHS)):
            dweights = dweights + (dweight[i] + tl.sum(d[i] * n[i], axis=0),)  # [WIDTH]
            dbiases = dbiases + (dbias[i] + tl.sum(d[i], axis=0),)
            g = g + (d[i] * _parameter(weight_ptr, i, 1.0, E, WIDTHS),)
        mean = tl.sum(g[0], axis=1)  # [ROWS]
        for i in tl.static_range(1, len(WIDTHS)):
            mean += tl.sum(g[i], axis=1)
        slope = _row_dot(g, n) / E
        dx = ()
        for i in tl.static_range(len(WIDTHS)):
            dx = dx + ((g[i] - (mean / E)[:, None] - n[i] * slope[:, None]) * rstd[:, None],)
        return dx, dweights, dbiases
