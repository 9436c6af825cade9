"""Softmax attention for the short, bidirectional sequences of a ViT: what fits on chip is computed in one pass.

While the keys of a head fit, their scores live in registers together and the softmax needs no running maximum; beyond,
a running softmax goes over tiles. The kernels of the backward are in `_attention_bwd`.
"""

# ruff: noqa: RUF005 - Triton has no unpacking
from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._attention import (
    _add_product,
    _head,
    _in_elements,
    _kept,
    _load_pieces,
    _load_rows,
    _normed,
    _numbers,
    _scores,
    _sequence,
    _store_rows,
    _survives,
    _times,
    _zero_rows,
)
from ._attention_bwd import _attention_bwd_kernel, _attention_bwd_q_kernel
from ._device import LN2, LOG2E


@triton.jit
def _attend(
    q, k, v, top, weight, total, first_row, first_key, N, S, scale_log2, mask_base, stride_mask,
    seed_ptr, dropout, h, b,
    BLOCK_M: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ONE_PASS: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys in PIECES, joined to what the rows have seen before unless these are all keys."""
    row = first_row + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    scores = ()
    start = first_key
    new_top = top
    for i in tl.static_range(len(PIECES)):
        key = start + tl.arange(0, PIECES[i])[None, :]  # [1, PIECE]
        s = _scores(q, k[i], row, key, N, S, scale_log2, mask_base, stride_mask, MASK, CAUSAL, i >= FULL)
        new_top = tl.maximum(new_top, tl.max(s, axis=1))
        scores = scores + (s,)
        start += PIECES[i]
    # A row without keys yet has no maximum to subtract.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # [BLOCK_M]
    if not ONE_PASS:
        fade = tl.exp2(top - shift)
        weight *= fade
        total = _times(total, fade[:, None])
    start = first_key
    for i in tl.static_range(len(PIECES)):
        p = tl.exp2(scores[i] - shift[:, None])  # [BLOCK_M, PIECE]
        weight += tl.sum(p, axis=1)
        if seed_ptr is not None:
            key = start + tl.arange(0, PIECES[i])[None, :]
            p = tl.where(_survives(seed_ptr, dropout, row, key, h, b), p, 0.0)
        total = _add_product(total, p, v[i])
        start += PIECES[i]
    return new_top, weight, total


@triton.jit
def _cleaned(pieces, spoiled):
    """The same rows with 0 in the place of what is no number, and 1 if there was any (or before)."""
    clean = ()
    for i in tl.static_range(len(pieces)):
        for j in tl.static_range(len(pieces[i])):
            number = tl.abs(pieces[i][j].to(tl.float32)) < float("inf")  # [PIECE, WIDTH]
            spoiled = max(spoiled, 1 - tl.min(tl.min(number.to(tl.int32), axis=1), axis=0))
        clean = clean + (_numbers(pieces[i]),)
    return clean, spoiled


@triton.jit
def _reveal(
    total, spoiled, v_base, stride_v, first_row, N, S, mask_base, stride_mask, E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Show what `_cleaned` left out to the queries that attend to it, in a second pass that is hardly ever taken."""
    row = first_row + tl.arange(0, BLOCK_M)[:, None]
    for start in tl.range(0, S * spoiled, BLOCK_N, num_stages=1):
        v = _load_rows(v_base, stride_v, start, S, E, BLOCK_N, WIDTHS, True, WIDE)
        key = start + tl.arange(0, BLOCK_N)[None, :]
        keep = _kept(row, key, N, S, mask_base, stride_mask, MASK, CAUSAL).to(tl.float16)  # [BLOCK_M, BLOCK_N]
        revealed = ()
        for i in tl.static_range(len(WIDTHS)):
            x = v[i].to(tl.float32)  # [BLOCK_N, WIDTH]
            number = tl.abs(x) < float("inf")
            upper = tl.where(number | (x < 0), 0.0, 1.0).to(tl.float16)  # NaN counts as both infinities
            lower = tl.where(number | (x > 0), 0.0, 1.0).to(tl.float16)
            y = total[i] + tl.where(tl.dot(keep, upper) > 0, float("inf"), 0.0)
            revealed = revealed + (y - tl.where(tl.dot(keep, lower) > 0, float("inf"), 0.0),)
        total = revealed
    return total


@triton.jit
def _keys_and_values(
    k_base, v_base, stride_k, stride_v, first, limit, k_weight_ptr, k_bias_ptr, k_eps, spoiled, E: tl.constexpr,
    PIECES: tl.constexpr, FULL: tl.constexpr, WIDTHS: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    k = _load_pieces(k_base, stride_k, first, limit, k_weight_ptr, k_bias_ptr, k_eps, E, PIECES, FULL, WIDTHS, WIDE)
    v = _load_pieces(v_base, stride_v, first, limit, None, None, None, E, PIECES, FULL, WIDTHS, WIDE)
    if MASK == "bool":
        v, spoiled = _cleaned(v, spoiled)
    return k, v, spoiled


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, seed_ptr, cu_seqlens_ptr,
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, q_eps, k_eps, scale, dropout, H, N, S, longest,
    stride_q, stride_k, stride_v, stride_mask, stride_out,
    E: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    ONE_PASS: tl.constexpr, BLOCK_M: tl.constexpr, ROW_TILES: tl.constexpr, HEADS: tl.constexpr,
    TILE: tl.constexpr, PIECES: tl.constexpr, FULL: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """A program takes ROW_TILES tiles of rows, of HEADS heads; a stride is that of (batch, head, token[, key])."""
    stride_q = _in_elements(stride_q, UNIT, WIDE)
    stride_k = _in_elements(stride_k, UNIT, WIDE)
    stride_v = _in_elements(stride_v, UNIT, WIDE)
    stride_out = _in_elements(stride_out, UNIT, WIDE)
    groups = tl.cdiv(longest, BLOCK_M * ROW_TILES)
    for i in range(HEADS):
        head = (tl.program_id(0) * HEADS + i) // groups
        first_tile = (tl.program_id(0) * HEADS + i) % groups * ROW_TILES
        b = (head // H).to(tl.int64)
        h = (head % H).to(tl.int64)
        batch, first, rows, keys = _sequence(b, N, S, longest, cu_seqlens_ptr)
        q_base = _head(q_ptr, stride_q, batch, h, first)
        k_base = _head(k_ptr, stride_k, batch, h, first)
        v_base = _head(v_ptr, stride_v, batch, h, first)
        out_base = _head(out_ptr, stride_out, batch, h, first)
        lse_base = lse_ptr + (batch * H + h) * N + first
        mask_base = q_base  # never read without a mask
        if MASK != "none":
            mask_base = _head(mask_ptr, stride_mask, b, h, 0)
        spoiled = 0
        if ONE_PASS:
            k, v, spoiled = _keys_and_values(
                k_base, v_base, stride_k[2], stride_v[2], 0, keys, k_weight_ptr, k_bias_ptr, k_eps, spoiled,
                E, PIECES, FULL, WIDTHS, MASK, WIDE,
            )  # fmt: skip

        tiles = ROW_TILES
        if cu_seqlens_ptr is not None:
            tiles = min(tiles, tl.cdiv(rows, BLOCK_M) - first_tile)
        for t in range(tiles):
            first_row = (first_tile + t) * BLOCK_M
            q = _load_rows(q_base, stride_q[2], first_row, rows, E, BLOCK_M, WIDTHS, True, WIDE)
            q = _normed(q, first_row, rows, q_weight_ptr, q_bias_ptr, q_eps, E, BLOCK_M, WIDTHS)
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            weight = tl.zeros([BLOCK_M], tl.float32)
            total = _zero_rows(BLOCK_M, WIDTHS)
            if not ONE_PASS:
                tail = keys // TILE[0] * TILE[0]
                stop = tail
                if CAUSAL:
                    stop = min(stop, first_row + BLOCK_M)
                for start in range(0, stop, TILE[0]):
                    k, v, spoiled = _keys_and_values(
                        k_base, v_base, stride_k[2], stride_v[2], start, keys, k_weight_ptr, k_bias_ptr, k_eps, spoiled,
                        E, TILE, 1, WIDTHS, MASK, WIDE,
                    )  # fmt: skip
                    top, weight, total = _attend(
                        q, k, v, top, weight, total, first_row, start, rows, keys, scale, mask_base, stride_mask,
                        seed_ptr, dropout, h, b, BLOCK_M, TILE, 1, MASK, CAUSAL, False,
                    )  # fmt: skip
                # At most once. In a loop, q is read from shared memory again; else its registers stay taken all along.
                for _ in tl.range(tail, keys, TILE[0], num_stages=1):
                    k, v, spoiled = _keys_and_values(
                        k_base, v_base, stride_k[2], stride_v[2], tail, keys, k_weight_ptr, k_bias_ptr, k_eps, spoiled,
                        E, PIECES, FULL, WIDTHS, MASK, WIDE,
                    )  # fmt: skip
                    top, weight, total = _attend(
                        q, k, v, top, weight, total, first_row, tail, rows, keys, scale, mask_base, stride_mask,
                        seed_ptr, dropout, h, b, BLOCK_M, PIECES, FULL, MASK, CAUSAL, False,
                    )  # fmt: skip
            else:
                top, weight, total = _attend(
                    q, k, v, top, weight, total, first_row, 0, rows, keys, scale, mask_base, stride_mask,
                    seed_ptr, dropout, h, b, BLOCK_M, PIECES, FULL, MASK, CAUSAL, True,
                )  # fmt: skip
            if MASK == "bool":
                total = _reveal(
                    total, spoiled, v_base, stride_v[2], first_row, rows, keys, mask_base, stride_mask,
                    E, BLOCK_M, TILE[0], WIDTHS, MASK, CAUSAL, WIDE,
                )  # fmt: skip
            weight = tl.where(top == float("-inf"), 1.0, weight)
            factor = 1 / weight
            if seed_ptr is not None:
                factor = factor / (1 - dropout)
            total = _times(total, factor[:, None])
            _store_rows(total, out_base, stride_out[2], first_row, rows, E, BLOCK_M, WIDTHS, WIDE)
            row = first_row + tl.arange(0, BLOCK_M)
            tl.store(lse_base + row, (top + tl.log2(weight)) * LN2, mask=row < rows)


def why_not(
    q, k, v, mask, causal, scale, dropout=0.0, seed=None, q_norm_weight=None, q_norm_bias=None, k_norm_weight=None,
    k_norm_bias=None, q_eps=None, k_eps=None, cu_seqlens=None, max_seqlen=0,
) -> str | None:  # fmt: skip
    if q.shape[-1] > _tuning.MAX_HEAD_DIM:
        return f"triton: attention takes head dims up to {_tuning.MAX_HEAD_DIM}, got {q.shape[-1]}"
    if (q_eps is not None or k_eps is not None) and q.shape[-1] > _tuning.MAX_NORMED_HEAD_DIM:
        return f"triton: attention normalises heads of up to {_tuning.MAX_NORMED_HEAD_DIM}, got {q.shape[-1]}"
    return _device.why_not(q)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the choice of tiles depends on.

    rows and keys: the most of a sequence; heads: those of all sequences; cores: the chip's multiprocessors; ragged:
    sequences differ in length; norm: of queries or keys; costly: a score needs more than its product, or rows are not
    read 16 bytes at a time.
    """

    rows: int
    keys: int
    heads: int
    cores: int
    ragged: bool
    norm: bool
    costly: bool

    @classmethod
    def of(cls, q, k, v, mask, causal, dropout, q_eps, k_eps, cu_seqlens, max_seqlen):
        aligned = _device.aligned(q, q.shape[3], *(s for t in (q, k, v) for s in t.stride()[:3]))
        norm = q_eps is not None or k_eps is not None
        costly = not aligned or mask is not None or causal or dropout > 0
        cores = _device.processors(q)
        if cu_seqlens is None:
            return cls(q.shape[2], k.shape[2], q.shape[0] * q.shape[1], cores, False, norm, costly)
        longest = min(max_seqlen, q.shape[2])
        return cls(longest, longest, (cu_seqlens.shape[0] - 1) * q.shape[1], cores, True, norm, costly)


def forward(
    q, k, v, mask, causal, scale, dropout=0.0, seed=None, q_norm_weight=None, q_norm_bias=None, k_norm_weight=None,
    k_norm_bias=None, q_eps=None, k_eps=None, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    batch, heads, tokens, head_dim = q.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    call = _Call.of(q, k, v, mask, causal, dropout, q_eps, k_eps, cu_seqlens, max_seqlen)
    if call.rows == 0 or call.heads == 0:
        return out, lse
    tile = _tuning.scores(_device.chip(q), q.element_size(), head_dim, call)
    wide, unit, strides = _strides(q, k, v, mask, out.transpose(1, 2))
    programs = call.heads * triton.cdiv(call.rows, tile.BLOCK_M * tile.ROW_TILES) // tile.HEADS
    with _device.on_device_of(q):
        _attention_fwd_kernel[(programs,)](
            q, k, v, mask, out, lse, seed if dropout else None, cu_seqlens,
            q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, q_eps, k_eps, scale * LOG2E.value, dropout,
            heads, tokens, k.shape[2], call.rows, *strides,
            E=head_dim, UNIT=unit, MASK=_mask_kind(mask), CAUSAL=causal, WIDE=wide, **vars(tile),
        )  # fmt: skip
    return out, lse


def backward(
    dout, q, k, v, out, lse, dq, dk, dv, mask, causal, scale, dropout=0.0, seed=None, q_norm_weight=None,
    q_norm_bias=None, k_norm_weight=None, k_norm_bias=None, q_eps=None, k_eps=None, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    """Write dq, dk, dv; returns the gradients of the norms' parameters, None where there is no parameter."""
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    call = _Call.of(q, k, v, mask, causal, dropout, q_eps, k_eps, cu_seqlens, max_seqlen)
    if call.rows == 0 or call.keys == 0 or call.heads == 0:
        for grad in (dq, dk, dv):
            grad.zero_()
        return [None if p is None else torch.zeros_like(p) for p in norms]
    heads, tokens, head_dim = q.shape[1:]
    chip, itemsize = _device.chip(q), q.element_size()
    tile = _tuning.score_gradients(chip, itemsize, head_dim, call)
    q_tile = None if tile.ONE_PASS else _tuning.score_gradients_of_queries(chip, itemsize, head_dim, call)
    programs = call.heads * (1 if tile.ONE_PASS else triton.cdiv(call.keys, tile.PIECES[0]))
    q_programs = programs if q_tile is None else call.heads * triton.cdiv(call.rows, q_tile.BLOCK_M)
    sums = [
        None if p is None else torch.empty((count, head_dim), dtype=torch.float32, device=q.device)
        for p, count in zip(norms, (q_programs, q_programs, programs, programs), strict=True)
    ]
    wide, unit, strides = _strides(q, k, v, mask, out.transpose(1, 2), dout.transpose(1, 2), dq, dk, dv)
    sizes = (scale, dropout, heads, tokens, k.shape[2])
    shared = {"E": head_dim, "UNIT": unit, "MASK": _mask_kind(mask), "CAUSAL": causal, "WIDE": wide}
    seed = seed if dropout else None
    with _device.on_device_of(q):
        delta = None
        if q_tile is not None:
            delta = torch.empty_like(lse)
            _attention_bwd_q_kernel[(q_programs,)](
                q, k, v, mask, out, dout, lse, delta, dq, seed, cu_seqlens, *norms, *sums[:2], q_eps, k_eps,
                *sizes, call.rows, *strides[:7], **shared, **vars(q_tile),
            )  # fmt: skip
        _attention_bwd_kernel[(programs,)](
            q, k, v, mask, out, dout, lse, delta, dq, dk, dv, seed, cu_seqlens, *norms, *sums, q_eps, k_eps,
            *sizes, call.keys, *strides, **shared, **vars(tile),
        )  # fmt: skip
    return [None if p is None else part.sum(0).to(p.dtype) for p, part in zip(norms, sums, strict=True)]


def _mask_kind(mask):
    return "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"


def _strides(q, k, v, mask, *others):
    """Whether offsets need 64 bits, elements of a unit, and in units (batch, head, token) of the (B, H, N, E) views;
    after v's (batch, head, token, key) of the mask, in elements."""
    rows = [t.stride()[:3] for t in (q, k, v, *others)]
    masks = (0, 0, 0, 0) if mask is None else mask.stride()
    flat = sum(rows, ())
    unit = 16 // q.element_size()
    if all(stride % 16 == 0 for stride in flat) or any(stride % unit for stride in flat):
        unit = 1  # the compiler sees for itself, or there is nothing to see
    units = [tuple(stride // unit for stride in strides) for strides in rows]
    return _device.wide((*flat, *masks)), unit, (*units[:3], masks, *units[3:])
