"""Patch embedding as one matrix product that reads the image by its strides, with positions and prefix tokens.

Each row of the product is a token. A prefix token is a row without pixels, so one pass writes the whole sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._device import _grouped_tile


def why_not(image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift) -> str | None:
    return _device.why_not(weight)


@triton.jit
def _patch_embed_fwd_kernel(
    image_ptr, weight_ptr, bias_ptr, pos_embed_ptr, prefix_ptr, pixel_scale_ptr, pixel_shift_ptr, tokens_ptr,
    M, D, TOKENS, PREFIX, POSITION_OFFSET, PATCHES_WIDE,
    stride_ib, stride_ic, stride_iy, stride_ix, stride_pn, stride_tn,
    HAS_BIAS: tl.constexpr, HAS_POS_EMBED: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_PIXEL_SCALE: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * P * Q
    dtype = weight_ptr.dtype.element_ty
    tile_m, tile_n = _grouped_tile(M, D, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    depth = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    row_inside = row < M
    column_inside = column < D
    token = row % TOKENS  # [BLOCK_M]
    is_patch = row_inside & (token >= PREFIX)
    patch = tl.where(is_patch, token - PREFIX, 0)
    patch_start = (row // TOKENS) * stride_ib
    patch_start += (patch // PATCHES_WIDE) * P * stride_iy + (patch % PATCHES_WIDE) * Q * stride_ix  # [BLOCK_M]
    weight_base = weight_ptr + tile_n.to(tl.int64) * BLOCK_N * K
    weight_block = weight_base + (tl.arange(0, BLOCK_N)[None, :] * K + depth[:, None])  # [BLOCK_K, BLOCK_N]

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + depth  # [BLOCK_K]
        channel = k // (P * Q)
        within = k % (P * Q)
        if WIDE:
            channel = channel.to(tl.int64)
            within = within.to(tl.int64)
        pixel_offset = channel * stride_ic + (within // Q) * stride_iy + (within % Q) * stride_ix  # [BLOCK_K]
        inside = is_patch[:, None] & (k < K)[None, :]
        pixels = tl.load(image_ptr + patch_start[:, None] + pixel_offset[None, :], mask=inside, other=0)
        if HAS_PIXEL_SCALE:
            scale = tl.load(pixel_scale_ptr + channel, mask=k < K, other=0.0)[None, :]  # [1, BLOCK_K]
            shift = tl.load(pixel_shift_ptr + channel, mask=k < K, other=0.0)[None, :]  # [1, BLOCK_K]
            # Prefix rows must stay without pixels, and 0 * scale + shift is not 0.
            pixels = tl.where(inside, pixels.to(tl.float32) * scale + shift, 0.0)  # [BLOCK_M, BLOCK_K]
            if image_ptr.dtype.element_ty != dtype and dtype == tl.float32:
                # On Blackwell a dot of what was widened to fp32 ignores "ieee" and runs in tf32; a sum hides that.
                pixels = tl.sum(pixels[:, :, None], axis=2)
            pixels = pixels.to(dtype)
        weight = tl.load(weight_block + start, mask=(k < K)[:, None] & column_inside[None, :], other=0.0)
        total = tl.dot(pixels, weight, total, input_precision="ieee")

    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
        total += tl.where(is_patch[:, None], bias, 0.0)
    if HAS_PREFIX:
        prefix_mask = (row_inside & (token < PREFIX))[:, None] & column_inside[None, :]
        prefix_block = prefix_ptr + token[:, None] * stride_pn + column[None, :]  # [BLOCK_M, BLOCK_N]
        total += tl.load(prefix_block, mask=prefix_mask, other=0.0).to(tl.float32)
    if HAS_POS_EMBED:
        position = token - POSITION_OFFSET  # [BLOCK_M]
        position_mask = (row_inside & (position >= 0))[:, None] & column_inside[None, :]
        position_block = pos_embed_ptr + position[:, None] * stride_tn + column[None, :]  # [BLOCK_M, BLOCK_N]
        total += tl.load(position_block, mask=position_mask, other=0.0).to(tl.float32)
    tokens_block = tokens_ptr + row[:, None] * D + column[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(tokens_block, total.to(dtype), mask=row_inside[:, None] & column_inside[None, :])


def forward(image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift):
    batch, channels, height, width = image.shape
    dim, _, patch_height, patch_width = weight.shape
    patches_wide = width // patch_width
    prefix_count = 0 if prefix is None else prefix.shape[0]
    token_count = prefix_count + (height // patch_height) * patches_wide
    tokens = torch.empty((batch, token_count, dim), dtype=weight.dtype, device=weight.device)
    if tokens.numel() == 0:
        return tokens
    aligned = image.dtype == weight.dtype and _device.aligned(weight, patch_width, *image.stride()[:3])
    tile = _tuning.product(_device.chip(weight), weight.element_size(), batch * token_count, aligned)
    wide = any(size * stride >= 1 << 31 for size, stride in zip(image.shape[1:], image.stride()[1:], strict=True))
    grid = (triton.cdiv(batch * token_count, tile.BLOCK_M) * triton.cdiv(dim, tile.BLOCK_N),)
    with _device.on_device_of(weight):
        _patch_embed_fwd_kernel[grid](
            image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift, tokens,
            batch * token_count, dim, token_count, prefix_count,
            0 if pos_embed is None else token_count - pos_embed.shape[0], patches_wide,
            *image.stride(), 0 if prefix is None else prefix.stride(0), 0 if pos_embed is None else pos_embed.stride(0),
            HAS_BIAS=bias is not None, HAS_POS_EMBED=pos_embed is not None, HAS_PREFIX=prefix is not None,
            HAS_PIXEL_SCALE=pixel_scale is not None, C=channels, P=patch_height, Q=patch_width, WIDE=wide,
            GROUP_M=_tuning.GROUP_M, **vars(tile),
        )  # fmt: skip
    return tokens
