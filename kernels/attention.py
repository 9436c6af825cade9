"""Softmax attention. The keys of a ViT fit on chip: one pass while they do, a running softmax over tiles beyond."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._device import LN2, LOG2E


def why_not(q, k, v, mask, causal, scale) -> str | None:
    if q.shape[-1] > _tuning.MAX_HEAD_DIM:
        return f"triton: attention takes head dims up to {_tuning.MAX_HEAD_DIM}, got {q.shape[-1]}"
    return _device.why_not(q)


@triton.jit
def _kept(mask_base, row, key, N, S, stride_mn, stride_ms, first_row, first_key,
          MASK: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """Which keys of a tile each query attends to; row and key count within the tile, mask_base points at its corner."""
    inside = (first_row + row < N)[:, None] & (first_key + key < S)[None, :]  # [BLOCK_M, BLOCK_N]
    keep = inside
    if MASK == "bool":
        keep = tl.load(mask_base + row[:, None] * stride_mn + key[None, :] * stride_ms, mask=inside, other=0) != 0
    if CAUSAL:
        keep = keep & ((first_row + row)[:, None] >= (first_key + key)[None, :])
    return keep


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr, scale_log2, H, N, S,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mn, stride_ms,
    E: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(N, BLOCK_M)
    head = tl.program_id(0) // tiles_m
    first_row = (tl.program_id(0) % tiles_m) * BLOCK_M
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    m = first_row.to(tl.int64)
    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    key = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    e = tl.arange(0, BLOCK_E)[None, :]  # [1, BLOCK_E]
    if WIDE:
        row = row.to(tl.int64)
        key = key.to(tl.int64)
    row_inside = first_row + row < N

    q_base = q_ptr + b * stride_qb + h * stride_qh + m * stride_qn
    q = tl.load(q_base + row[:, None] * stride_qn + e, mask=row_inside[:, None] & (e < E), other=0.0)
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh
    mask_base = q_base  # never read without a mask
    if MASK != "none":
        mask_base = mask_ptr + b * stride_mb + h * stride_mh + m * stride_mn

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    spoiled = 0
    keys = BLOCK_N if ONE_PASS else S
    if CAUSAL:
        keys = min(keys, first_row + BLOCK_M)
    for start in range(0, keys, BLOCK_N):
        n = tl.cast(start, tl.int64)
        kv_mask = (start + key < S)[:, None] & (e < E)  # [BLOCK_N, BLOCK_E]
        k = tl.load(k_base + n * stride_kn + key[:, None] * stride_kn + e, mask=kv_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if MASK == "none" and not CAUSAL:
            keep = (start + key < S)[None, :]  # [1, BLOCK_N]
        else:
            keep = _kept(
                mask_base + n * stride_ms, row, key, N, S, stride_mn, stride_ms, first_row, start, MASK, CAUSAL
            )
        if MASK == "additive":
            bias_block = mask_base + n * stride_ms + row[:, None] * stride_mn + key[None, :] * stride_ms
            s += tl.load(bias_block, mask=keep, other=0.0).to(tl.float32) * LOG2E
        s = tl.where(keep, s, float("-inf"))

        new_top = tl.maximum(top, tl.max(s, axis=1))
        # A row without keys yet has no maximum to subtract.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])  # [BLOCK_M, BLOCK_N]
        if not ONE_PASS:
            fade = tl.exp2(top - shift)
            weight *= fade
            total *= fade[:, None]
        top = new_top
        weight += tl.sum(p, axis=1)
        v = tl.load(v_base + n * stride_vn + key[:, None] * stride_vn + e, mask=kv_mask, other=0.0)
        if MASK == "bool":
            # The 0 of a masked key times NaN is NaN, so what is no number stays out of the product ...
            number = tl.abs(v.to(tl.float32)) < float("inf")  # [BLOCK_N, BLOCK_E]
            v = tl.where(number, v, 0.0).to(v.dtype)
            spoiled = max(spoiled, 1 - tl.min(tl.min(number.to(tl.int32), axis=1), axis=0))
        total = tl.dot(p.to(v.dtype), v, total, input_precision="ieee")

    if MASK == "bool":
        # ... and reaches only the queries that attend to it, in a second pass that is hardly ever taken.
        for start in range(0, keys * spoiled, BLOCK_N):
            n = tl.cast(start, tl.int64)
            kv_mask = (start + key < S)[:, None] & (e < E)  # [BLOCK_N, BLOCK_E]
            v = tl.load(v_base + n * stride_vn + key[:, None] * stride_vn + e, mask=kv_mask, other=0.0).to(tl.float32)
            keep = _kept(
                mask_base + n * stride_ms, row, key, N, S, stride_mn, stride_ms, first_row, start, MASK, CAUSAL
            )
            keep = keep.to(tl.float16)  # [BLOCK_M, BLOCK_N]
            number = tl.abs(v) < float("inf")
            upper = tl.where(number | (v < 0), 0.0, 1.0).to(tl.float16)  # NaN counts as both infinities
            total += tl.where(tl.dot(keep, upper) > 0, float("inf"), 0.0)
            lower = tl.where(number | (v > 0), 0.0, 1.0).to(tl.float16)
            total -= tl.where(tl.dot(keep, lower) > 0, float("inf"), 0.0)

    weight = tl.where(top == float("-inf"), 1.0, weight)
    out = total / weight[:, None]  # [BLOCK_M, BLOCK_E]
    out_base = out_ptr + ((b * N + m) * H + h) * E
    tl.store(
        out_base + row[:, None] * (H * E) + e, out.to(out_ptr.dtype.element_ty), mask=row_inside[:, None] & (e < E)
    )
    tl.store(lse_ptr + (b * H + h) * N + m + row, (top + tl.log2(weight)) * LN2, mask=row_inside)


def forward(q, k, v, mask, causal, scale):
    batch, heads, tokens, head_dim = q.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0, 0) if mask is None else mask.stride()))
    aligned = _device.aligned(q, head_dim, *strides[:9])
    tile = _tuning.scores(_device.chip(q), q.element_size(), head_dim, k.shape[2], mask is not None, aligned)
    with _device.on_device_of(q):
        _attention_fwd_kernel[(batch * heads * triton.cdiv(tokens, tile.BLOCK_M),)](
            q, k, v, mask, out, lse, scale * LOG2E.value, heads, tokens, k.shape[2],
            *strides, E=head_dim, MASK=kind, CAUSAL=causal, WIDE=_device.wide(strides), **vars(tile),
        )  # fmt: skip
    return out, lse
