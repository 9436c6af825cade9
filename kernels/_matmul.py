"""The matrix product behind linear and norm_mlp: LayerNorm of its left side on the way in, epilogue on the way out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._device import _activate, _grouped_tile


@triton.jit
def _linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, layer_scale_ptr, residual_ptr, y_ptr, preact_ptr,
    mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr,
    M, N, K, stride_xm, stride_wn, stride_rm,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    KEEP_PREACT: tl.constexpr, HAS_NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M
    n = tile_n.to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    depth = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    row_inside = m + row < M
    column_inside = n + column < N
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    x_block = x_ptr + m * stride_xm + (row[:, None] * stride_xm + depth[None, :])  # [BLOCK_M, BLOCK_K]
    weight_block = weight_ptr + n * stride_wn + (column[None, :] * stride_wn + depth[:, None])  # [BLOCK_K, BLOCK_N]
    if HAS_NORM:
        mean = tl.load(mean_ptr + m + row, mask=row_inside, other=0.0)[:, None]  # [BLOCK_M, 1]
        rstd = tl.load(rstd_ptr + m + row, mask=row_inside, other=0.0)[:, None]  # [BLOCK_M, 1]

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        x_mask = row_inside[:, None]
        weight_mask = column_inside[None, :]
        depth_inside = start + depth < K
        if not EVEN_K:
            x_mask = x_mask & depth_inside[None, :]
            weight_mask = weight_mask & depth_inside[:, None]
        x = tl.load(x_block + start, mask=x_mask, other=0.0)
        weight = tl.load(weight_block + start, mask=weight_mask, other=0.0)
        if HAS_NORM:
            # Columns beyond K need no care: they meet a zero of the weight.
            h = (x.to(tl.float32) - mean) * rstd
            if HAS_NORM_WEIGHT:
                h *= tl.load(norm_weight_ptr + start + depth, mask=depth_inside, other=0.0).to(tl.float32)[None, :]
            if HAS_NORM_BIAS:
                h += tl.load(norm_bias_ptr + start + depth, mask=depth_inside, other=0.0).to(tl.float32)[None, :]
            x = h.to(x_ptr.dtype.element_ty)
        total = tl.dot(x, weight, total, input_precision="ieee")

    inside = row_inside[:, None] & column_inside[None, :]
    y_offset = row[:, None] * N + column[None, :]  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if KEEP_PREACT:
        tl.store(preact_ptr + m * N + n + y_offset, total.to(preact_ptr.dtype.element_ty), mask=inside)
    y = _activate(total, ACTIVATION)
    if HAS_LAYER_SCALE:
        y *= tl.load(layer_scale_ptr + n + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual_block = residual_ptr + m * stride_rm + n + (row[:, None] * stride_rm + column[None, :])
        y += tl.load(residual_block, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def linear(x, weight, bias, layer_scale, residual, activation, keep_preact, norm=None):
    """linear.forward, with x normalised on the way in if norm = (mean, rstd, norm_weight, norm_bias) is given."""
    row_count, depth = x.shape
    width = weight.shape[0]
    y = torch.empty((row_count, width), dtype=x.dtype, device=x.device)
    preact = torch.empty_like(y) if keep_preact else x.new_empty(0)
    if y.numel() == 0:
        return y, preact
    mean, rstd, norm_weight, norm_bias = norm or (None, None, None, None)
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    aligned = _device.aligned(x, depth, *strides)
    tile = _tuning.product(_device.chip(x), x.element_size(), row_count, aligned)
    grid = (triton.cdiv(row_count, tile.BLOCK_M) * triton.cdiv(width, tile.BLOCK_N),)
    with _device.on_device_of(x):
        _linear_fwd_kernel[grid](
            x, weight, bias, layer_scale, residual, y, preact, mean, rstd, norm_weight, norm_bias,
            row_count, width, depth, *strides,
            ACTIVATION=activation, HAS_BIAS=bias is not None, HAS_LAYER_SCALE=layer_scale is not None,
            HAS_RESIDUAL=residual is not None, KEEP_PREACT=keep_preact, HAS_NORM=norm is not None,
            HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
            EVEN_K=depth % tile.BLOCK_K == 0, WIDE=_device.wide((*strides, width)),
            GROUP_M=_tuning.GROUP_M, **vars(tile),
        )  # fmt: skip
    return y, preact
