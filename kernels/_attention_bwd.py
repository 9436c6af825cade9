"""Backward of attention: one kernel while the keys of a head fit, else one for queries and one for keys. No atomics.

P = exp(scale QKᵀ + mask - lse), dV = Pᵀ dO, dS = P * (dO Vᵀ - Σ_e dO O), dQ = scale dS K, dK = scale dSᵀ Q.
Keys are the rows of the products for dK and dV, so that Pᵀ and dSᵀ go into them straight from registers.
"""

# ruff: noqa: RUF005 - Triton has no unpacking
from __future__ import annotations

import triton
import triton.language as tl

from ._attention import (
    _add_product,
    _columns,
    _head,
    _in_elements,
    _load_pieces,
    _load_rows,
    _normed,
    _numbers,
    _product,
    _row_dot,
    _scores,
    _sequence,
    _store_rows,
    _survives,
    _through_norm,
    _times,
    _zero_rows,
    _zero_vectors,
    _zeros,
)
from ._device import LOG2E


@triton.jit
def _slopes(s, dp, lse, delta, row, key, seed_ptr, dropout, h, b):
    """(weights as they met the values, gradient of the scores) from scores and dO Vᵀ, in either orientation."""
    p = tl.exp2(s - lse)
    kept = p
    if seed_ptr is not None:
        survives = _survives(seed_ptr, dropout, row, key, h, b)
        kept = tl.where(survives, p, 0.0)
        dp = tl.where(survives, dp * (1 / (1 - dropout)), 0.0)
    # What a masked value holds is in dp, and 0 times NaN would be NaN.
    return kept, tl.where(p == 0.0, 0.0, p * (dp - delta))


@triton.jit
def _load_lse(lse_base, row, N):
    """log-sum-exp to the base 2; +inf, which makes every weight 0, for a row without keys or outside."""
    lse = tl.load(lse_base + row, mask=row < N, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit
def _store_sums(sums, base, E: tl.constexpr, WIDTHS: tl.constexpr):
    """This program's share of a norm's parameter gradient: its row of (programs, E)."""
    if base is not None:
        for i in tl.static_range(len(WIDTHS)):
            e = _columns(i, WIDTHS)
            tl.store(base + tl.program_id(0).to(tl.int64) * E + e, sums[i][None, :], mask=e < E)


@triton.jit
def _zero_columns(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    x = ()
    for i in tl.static_range(len(WIDTHS)):
        x = x + (_zeros(WIDTHS[i], ROWS),)
    return x


@triton.jit
def _add_transposed(total, x, p):
    """total + xT p: [WIDTH, BLOCK_M] has rows enough for a warp group where [BLOCK_M, WIDTH] has not."""
    p = p.to(x[0].dtype)
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.dot(tl.trans(x[i]), p, total[i], input_precision="ieee"),)
    return y


@triton.jit
def _transposed(x):
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.trans(x[i]),)
    return y


@triton.jit
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, seed_ptr,
    cu_seqlens_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,
    dq_weight_ptr, dq_bias_ptr, dk_weight_ptr, dk_bias_ptr, q_eps, k_eps, scale, dropout, H, N, S, longest,
    stride_q, stride_k, stride_v, stride_mask, stride_out, stride_dout, stride_dq, stride_dk, stride_dv,
    E: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    ONE_PASS: tl.constexpr, BLOCK_M: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys; in one pass these are all keys of the head, and dQ is complete as well."""
    stride_q = _in_elements(stride_q, UNIT, WIDE)
    stride_k = _in_elements(stride_k, UNIT, WIDE)
    stride_v = _in_elements(stride_v, UNIT, WIDE)
    stride_out = _in_elements(stride_out, UNIT, WIDE)
    stride_dout = _in_elements(stride_dout, UNIT, WIDE)
    stride_dq = _in_elements(stride_dq, UNIT, WIDE)
    stride_dk = _in_elements(stride_dk, UNIT, WIDE)
    stride_dv = _in_elements(stride_dv, UNIT, WIDE)
    blocks = 1
    if not ONE_PASS:
        blocks = tl.cdiv(longest, PIECES[0])
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    batch, first, rows, keys = _sequence(b, N, S, longest, cu_seqlens_ptr)
    q_base = _head(q_ptr, stride_q, batch, h, first)
    k_base = _head(k_ptr, stride_k, batch, h, first)
    out_base = _head(out_ptr, stride_out, batch, h, first)
    dout_base = _head(dout_ptr, stride_dout, batch, h, first)
    dq_base = _head(dq_ptr, stride_dq, batch, h, first)
    lse_at = (batch * H + h) * N + first
    mask_base = q_base  # never read without a mask
    if MASK != "none":
        mask_base = _head(mask_ptr, stride_mask, b, h, 0)

    first_key = (tl.program_id(0) % blocks) * PIECES[0]
    first_row = 0
    if CAUSAL and not ONE_PASS:
        first_row = first_key // BLOCK_M * BLOCK_M
    v_base = _head(v_ptr, stride_v, batch, h, first)
    k = _load_pieces(
        k_base, stride_k[2], first_key, keys, k_weight_ptr, k_bias_ptr, k_eps, E, PIECES, FULL, WIDTHS, WIDE
    )
    v = _load_pieces(v_base, stride_v[2], first_key, keys, None, None, None, E, PIECES, FULL, WIDTHS, WIDE)
    dk = ()
    dv = ()
    for i in tl.static_range(len(PIECES)):
        dk = dk + (_zero_rows(PIECES[i], WIDTHS),)
        dv = dv + (_zero_rows(PIECES[i], WIDTHS),)
    dweight = _zero_vectors(WIDTHS)
    dbias = _zero_vectors(WIDTHS)
    for start in range(first_row, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        q = _load_rows(q_base, stride_q[2], start, rows, E, BLOCK_M, WIDTHS, True, WIDE)
        q = _normed(q, start, rows, q_weight_ptr, q_bias_ptr, q_eps, E, BLOCK_M, WIDTHS)
        dout = _load_rows(dout_base, stride_dout[2], start, rows, E, BLOCK_M, WIDTHS, True, WIDE)
        lse = _load_lse(lse_ptr + lse_at, row, rows)
        if ONE_PASS:
            out = _load_rows(out_base, stride_out[2], start, rows, E, BLOCK_M, WIDTHS, True, WIDE)
            delta = _row_dot(dout, out)
            dq = _zero_columns(BLOCK_M, WIDTHS)
        else:
            delta = tl.load(delta_ptr + lse_at + row, mask=row < rows, other=0.0)
        new_dk = ()
        new_dv = ()
        key_start = first_key
        for i in tl.static_range(len(PIECES)):
            key = key_start + tl.arange(0, PIECES[i])[:, None]  # [PIECE, 1]
            s = _scores(
                k[i], q, row[None, :], key, rows, keys, scale * LOG2E, mask_base, stride_mask, MASK, CAUSAL, i >= FULL
            )  # [PIECE, BLOCK_M]
            p, ds = _slopes(
                s, _product(v[i], dout), lse[None, :], delta[None, :], row[None, :], key, seed_ptr, dropout, h, b
            )
            new_dv = new_dv + (_add_product(dv[i], p, dout),)
            new_dk = new_dk + (_add_product(dk[i], ds, q),)
            if ONE_PASS:
                if MASK == "bool":
                    dq = _add_transposed(dq, _numbers(k[i]), ds)
                else:
                    dq = _add_transposed(dq, k[i], ds)
            key_start += PIECES[i]
        dk = new_dk
        dv = new_dv
        if ONE_PASS:
            dq, dweight, dbias = _through_norm(
                _times(_transposed(dq), scale), q_base, stride_q[2], start, rows, q_weight_ptr, q_eps, dweight, dbias,
                E, BLOCK_M, WIDTHS, WIDE,
            )  # fmt: skip
            _store_rows(dq, dq_base, stride_dq[2], start, rows, E, BLOCK_M, WIDTHS, WIDE)
    if ONE_PASS:
        _store_sums(dweight, dq_weight_ptr, E, WIDTHS)
        _store_sums(dbias, dq_bias_ptr, E, WIDTHS)

    dk_base = _head(dk_ptr, stride_dk, batch, h, first)
    dv_base = _head(dv_ptr, stride_dv, batch, h, first)
    dweight = _zero_vectors(WIDTHS)
    dbias = _zero_vectors(WIDTHS)
    for i in tl.static_range(len(PIECES)):
        dki, dweight, dbias = _through_norm(
            _times(dk[i], scale), k_base, stride_k[2], first_key, keys, k_weight_ptr, k_eps, dweight, dbias,
            E, PIECES[i], WIDTHS, WIDE,
        )  # fmt: skip
        _store_rows(dki, dk_base, stride_dk[2], first_key, keys, E, PIECES[i], WIDTHS, WIDE)
        dvi = dv[i]
        if seed_ptr is not None:
            dvi = _times(dvi, 1 / (1 - dropout))
        _store_rows(dvi, dv_base, stride_dv[2], first_key, keys, E, PIECES[i], WIDTHS, WIDE)
        first_key += PIECES[i]
    _store_sums(dweight, dk_weight_ptr, E, WIDTHS)
    _store_sums(dbias, dk_bias_ptr, E, WIDTHS)


@triton.jit
def _add_slopes(
    dq, q, dout, k, v, lse, delta, row, first_key, N, S, scale, mask_base, stride_mask, seed_ptr, dropout, h, b,
    PIECES: tl.constexpr, FULL: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dQ / scale with what the keys in PIECES contribute."""
    for i in tl.static_range(len(PIECES)):
        key = first_key + tl.arange(0, PIECES[i])[None, :]  # [1, PIECE]
        s = _scores(
            q, k[i], row[:, None], key, N, S, scale * LOG2E, mask_base, stride_mask, MASK, CAUSAL, i >= FULL
        )  # [BLOCK_M, PIECE]
        _, ds = _slopes(
            s, _product(dout, v[i]), lse[:, None], delta[:, None], row[:, None], key, seed_ptr, dropout, h, b
        )
        if MASK == "bool":
            dq = _add_product(dq, ds, _numbers(k[i]))
        else:
            dq = _add_product(dq, ds, k[i])
        first_key += PIECES[i]
    return dq


@triton.jit
def _attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, seed_ptr, cu_seqlens_ptr,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, dq_weight_ptr, dq_bias_ptr, q_eps, k_eps, scale, dropout,
    H, N, S, longest, stride_q, stride_k, stride_v, stride_mask, stride_out, stride_dout, stride_dq,
    E: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """dQ of a block of rows, and Σ_e dO O of its rows for the kernel of dK and dV."""
    stride_q = _in_elements(stride_q, UNIT, WIDE)
    stride_k = _in_elements(stride_k, UNIT, WIDE)
    stride_v = _in_elements(stride_v, UNIT, WIDE)
    stride_out = _in_elements(stride_out, UNIT, WIDE)
    stride_dout = _in_elements(stride_dout, UNIT, WIDE)
    stride_dq = _in_elements(stride_dq, UNIT, WIDE)
    blocks = tl.cdiv(longest, BLOCK_M)
    start = (tl.program_id(0) % blocks) * BLOCK_M
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    batch, first, rows, keys = _sequence(b, N, S, longest, cu_seqlens_ptr)
    q_base = _head(q_ptr, stride_q, batch, h, first)
    k_base = _head(k_ptr, stride_k, batch, h, first)
    v_base = _head(v_ptr, stride_v, batch, h, first)
    lse_at = (batch * H + h) * N + first
    mask_base = q_base  # never read without a mask
    if MASK != "none":
        mask_base = _head(mask_ptr, stride_mask, b, h, 0)

    row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = _load_rows(q_base, stride_q[2], start, rows, E, BLOCK_M, WIDTHS, True, WIDE)
    q = _normed(q, start, rows, q_weight_ptr, q_bias_ptr, q_eps, E, BLOCK_M, WIDTHS)
    dout_base = _head(dout_ptr, stride_dout, batch, h, first)
    dout = _load_rows(dout_base, stride_dout[2], start, rows, E, BLOCK_M, WIDTHS, True, WIDE)
    out_base = _head(out_ptr, stride_out, batch, h, first)
    delta = _row_dot(dout, _load_rows(out_base, stride_out[2], start, rows, E, BLOCK_M, WIDTHS, True, WIDE))
    tl.store(delta_ptr + lse_at + row, delta, mask=row < rows)
    lse = _load_lse(lse_ptr + lse_at, row, rows)
    dq = _zero_rows(BLOCK_M, WIDTHS)
    tail = keys // TILE[0] * TILE[0]
    stop = tail
    if CAUSAL:
        stop = min(stop, start + BLOCK_M)
    for key in range(0, stop, TILE[0]):
        k = _load_pieces(k_base, stride_k[2], key, keys, k_weight_ptr, k_bias_ptr, k_eps, E, TILE, 1, WIDTHS, WIDE)
        v = _load_pieces(v_base, stride_v[2], key, keys, None, None, None, E, TILE, 1, WIDTHS, WIDE)
        dq = _add_slopes(
            dq, q, dout, k, v, lse, delta, row, key, rows, keys, scale, mask_base, stride_mask, seed_ptr, dropout, h, b,
            TILE, 1, MASK, CAUSAL,
        )  # fmt: skip
    # At most once; a loop for the sake of registers, as in the forward.
    for _ in tl.range(tail, keys, TILE[0], num_stages=1):
        k = _load_pieces(
            k_base, stride_k[2], tail, keys, k_weight_ptr, k_bias_ptr, k_eps, E, PIECES, FULL, WIDTHS, WIDE
        )
        v = _load_pieces(v_base, stride_v[2], tail, keys, None, None, None, E, PIECES, FULL, WIDTHS, WIDE)
        dq = _add_slopes(
            dq, q, dout, k, v, lse, delta, row, tail, rows, keys, scale, mask_base, stride_mask, seed_ptr, dropout,
            h, b, PIECES, FULL, MASK, CAUSAL,
        )  # fmt: skip
    dq, dweight, dbias = _through_norm(
        _times(dq, scale), q_base, stride_q[2], start, rows, q_weight_ptr, q_eps, _zero_vectors(WIDTHS),
        _zero_vectors(WIDTHS), E, BLOCK_M, WIDTHS, WIDE,
    )  # fmt: skip
    dq_base = _head(dq_ptr, stride_dq, batch, h, first)
    _store_rows(dq, dq_base, stride_dq[2], start, rows, E, BLOCK_M, WIDTHS, WIDE)
    _store_sums(dweight, dq_weight_ptr, E, WIDTHS)
    _store_sums(dbias, dq_bias_ptr, E, WIDTHS)
