"""LayerNorm -> Linear -> activation -> Linear -> LayerScale -> residual sum in one kernel, for narrow rows.

A program keeps its normalised rows and its sums of the second product on chip and walks the hidden width in chunks, so
hidden activations never reach memory. Rows and sums are up to three pieces of at most 128 columns, a, b and c, that
hold exactly one row: nothing is masked but rows, and the epilogue rearranges a piece at a time, for want of registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._device import _activate, _refined_statistics


@triton.jit
def _load_piece(x_ptr, rows, columns, M, stride_xm, AGAIN: tl.constexpr):
    """AGAIN reads past the first cache; as the first load's twin it would be merged with it and held in registers."""
    modifier: tl.constexpr = ".cg" if AGAIN else ""
    x = tl.load(x_ptr + rows * stride_xm + columns, mask=rows < M, other=0.0, cache_modifier=modifier)
    return x.to(tl.float32)


@triton.jit
def _centred_sums(x, mean):
    x -= mean[:, None]
    return tl.sum(x, axis=1), tl.sum(x * x, axis=1)


@triton.jit
def _normalise(x, mean, rstd, weight_ptr, bias_ptr, columns, DTYPE: tl.constexpr,
               HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    n = (x - mean[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        n *= tl.load(weight_ptr + columns).to(tl.float32)
    if HAS_BIAS:
        n += tl.load(bias_ptr + columns).to(tl.float32)
    return n.to(DTYPE)


@triton.jit
def _up(n, h, fc1_ptr, hidden, columns, stride):
    """h + n W₁ᵀ for a chunk of the hidden width: n [BLOCK_M, columns], h [BLOCK_M, BLOCK_F]."""
    weight = tl.load(fc1_ptr + (hidden[None, :] * stride + columns[:, None]))  # [columns, BLOCK_F]
    return tl.dot(n, weight, h, input_precision="ieee")


@triton.jit
def _down(h, total, fc2_ptr, hidden, columns, stride):
    """total + h W₂ᵀ for a chunk of the hidden width: h [BLOCK_M, BLOCK_F], total [BLOCK_M, columns]."""
    weight = tl.load(fc2_ptr + (columns[None, :] * stride + hidden[:, None]))  # [BLOCK_F, columns]
    return tl.dot(h, weight, total, input_precision="ieee")


@triton.jit
def _store_piece(total, x_ptr, fc2_bias_ptr, layer_scale_ptr, factor, y_ptr, rows, columns, M, D, stride_xm,
                 HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_SAMPLE_SCALE: tl.constexpr,
                 HAS_RESIDUAL: tl.constexpr):  # fmt: skip
    if HAS_BIAS:
        total += tl.load(fc2_bias_ptr + columns).to(tl.float32)
    if HAS_LAYER_SCALE:
        total *= tl.load(layer_scale_ptr + columns).to(tl.float32)
    if HAS_SAMPLE_SCALE:
        total *= factor
    if HAS_RESIDUAL:
        total += _load_piece(x_ptr, rows, columns, M, stride_xm, True)
    tl.store(y_ptr + rows * D + columns, total.to(y_ptr.dtype.element_ty), mask=rows < M)


@triton.jit
def _norm_mlp_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_ptr, fc1_bias_ptr, fc2_ptr, fc2_bias_ptr, layer_scale_ptr,
    sample_scale_ptr, y_ptr, mean_ptr, rstd_ptr, preact_ptr,
    M, D, F, SAMPLE_ROWS, stride_xm, stride_1, stride_2, eps,
    ACTIVATION: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_FC1_BIAS: tl.constexpr,
    HAS_FC2_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_SAMPLE_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, KEEP: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, LAST_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # Within a tile 32-bit offsets do, and leave more registers to the sums.
    m = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    sample = (m + rows) // SAMPLE_ROWS  # [BLOCK_M, 1]
    x_ptr += m * stride_xm
    y_ptr += m * D
    M = (M - m).to(tl.int32)
    a = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    xa = _load_piece(x_ptr, rows, a[None, :], M, stride_xm, False)  # [BLOCK_M, BLOCK_D]
    mean = tl.sum(xa, axis=1) / D  # [BLOCK_M]
    if PIECES > 1:
        b = BLOCK_D + tl.arange(0, LAST_D if PIECES == 2 else BLOCK_D)
        xb = _load_piece(x_ptr, rows, b[None, :], M, stride_xm, False)
        mean += tl.sum(xb, axis=1) / D
    if PIECES > 2:
        c = 2 * BLOCK_D + tl.arange(0, LAST_D)
        xc = _load_piece(x_ptr, rows, c[None, :], M, stride_xm, False)
        mean += tl.sum(xc, axis=1) / D
    missed, squares = _centred_sums(xa, mean)
    if PIECES > 1:
        missed_b, squares_b = _centred_sums(xb, mean)
        missed, squares = missed + missed_b, squares + squares_b
    if PIECES > 2:
        missed_c, squares_c = _centred_sums(xc, mean)
        missed, squares = missed + missed_c, squares + squares_c
    mean, rstd = _refined_statistics(mean, missed, squares, D, eps)
    if KEEP:
        row = tl.arange(0, BLOCK_M)
        tl.store(mean_ptr + m + row, mean, mask=row < M)
        tl.store(rstd_ptr + m + row, rstd, mask=row < M)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    na = _normalise(xa, mean, rstd, norm_weight_ptr, norm_bias_ptr, a[None, :], dtype,
                    HAS_NORM_WEIGHT, HAS_NORM_BIAS)  # fmt: skip
    total_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if PIECES > 1:
        nb = _normalise(xb, mean, rstd, norm_weight_ptr, norm_bias_ptr, b[None, :], dtype,
                        HAS_NORM_WEIGHT, HAS_NORM_BIAS)  # fmt: skip
        total_b = tl.zeros([BLOCK_M, LAST_D if PIECES == 2 else BLOCK_D], tl.float32)
    if PIECES > 2:
        nc = _normalise(xc, mean, rstd, norm_weight_ptr, norm_bias_ptr, c[None, :], dtype,
                        HAS_NORM_WEIGHT, HAS_NORM_BIAS)  # fmt: skip
        total_c = tl.zeros([BLOCK_M, LAST_D], tl.float32)
    for start in range(0, F, BLOCK_F):
        hidden = start + tl.arange(0, BLOCK_F)  # [BLOCK_F]
        h = _up(na, tl.zeros([BLOCK_M, BLOCK_F], tl.float32), fc1_ptr, hidden, a, stride_1)
        if PIECES > 1:
            h = _up(nb, h, fc1_ptr, hidden, b, stride_1)
        if PIECES > 2:
            h = _up(nc, h, fc1_ptr, hidden, c, stride_1)
        if HAS_FC1_BIAS:
            h += tl.load(fc1_bias_ptr + hidden).to(tl.float32)[None, :]
        if KEEP:
            preact = preact_ptr + m * F + (rows * F + hidden[None, :])  # [BLOCK_M, BLOCK_F]
            tl.store(preact, h.to(dtype), mask=rows < M)
        h = _activate(h, ACTIVATION).to(dtype)
        total_a = _down(h, total_a, fc2_ptr, hidden, a, stride_2)
        if PIECES > 1:
            total_b = _down(h, total_b, fc2_ptr, hidden, b, stride_2)
        if PIECES > 2:
            total_c = _down(h, total_c, fc2_ptr, hidden, c, stride_2)

    factor = 1.0
    if HAS_SAMPLE_SCALE:
        factor = tl.load(sample_scale_ptr + sample, mask=rows < M, other=0.0).to(tl.float32)  # [BLOCK_M, 1]
    _store_piece(total_a, x_ptr, fc2_bias_ptr, layer_scale_ptr, factor, y_ptr, rows, a[None, :], M, D, stride_xm,
                 HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_SAMPLE_SCALE, HAS_RESIDUAL)  # fmt: skip
    if PIECES > 1:
        _store_piece(total_b, x_ptr, fc2_bias_ptr, layer_scale_ptr, factor, y_ptr, rows, b[None, :], M, D, stride_xm,
                     HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_SAMPLE_SCALE, HAS_RESIDUAL)  # fmt: skip
    if PIECES > 2:
        _store_piece(total_c, x_ptr, fc2_bias_ptr, layer_scale_ptr, factor, y_ptr, rows, c[None, :], M, D, stride_xm,
                     HAS_FC2_BIAS, HAS_LAYER_SCALE, HAS_SAMPLE_SCALE, HAS_RESIDUAL)  # fmt: skip


def tile_for(x, fc1_weight, fc2_weight):
    """The tile with which the kernel takes this call, or None where two products are the better way or the only one."""
    row_count, width = x.shape
    hidden = fc1_weight.shape[0]
    strides = (x.stride(0), fc1_weight.stride(0), fc2_weight.stride(0))
    # The chunks' offsets are 32 bits wide, and rows not read 16 bytes at a time would cost an address for each element.
    far = max(hidden * strides[1], width * strides[2]) + hidden >= 1 << 31 or _device.wide((*strides, hidden))
    if not row_count or far or fc2_weight.shape[0] != width or not _device.aligned(x, width, hidden, *strides):
        return None
    return _tuning.fused_mlp(_device.chip(x), x.element_size(), row_count, width, hidden)


def forward(
    tile, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, eps, activation, residual,
    keep, sample_scale,
):  # fmt: skip
    """norm_mlp.forward with a tile of tile_for."""
    row_count, width = x.shape
    hidden = fc1_weight.shape[0]
    y = torch.empty((row_count, width), dtype=x.dtype, device=x.device)
    mean = torch.empty(row_count if keep else 0, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    preact = torch.empty((row_count, hidden) if keep else (0,), dtype=x.dtype, device=x.device)
    with _device.on_device_of(x):
        _norm_mlp_fwd_kernel[(triton.cdiv(row_count, tile.BLOCK_M),)](
            x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, sample_scale,
            y, mean, rstd, preact,
            row_count, width, hidden, 1 if sample_scale is None else row_count // sample_scale.shape[0],
            x.stride(0), fc1_weight.stride(0), fc2_weight.stride(0), eps,
            ACTIVATION=activation, HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
            HAS_FC1_BIAS=fc1_bias is not None, HAS_FC2_BIAS=fc2_bias is not None,
            HAS_LAYER_SCALE=layer_scale is not None, HAS_SAMPLE_SCALE=sample_scale is not None,
            HAS_RESIDUAL=residual, KEEP=keep, **vars(tile),
        )  # fmt: skip
    return y, mean, rstd, preact
