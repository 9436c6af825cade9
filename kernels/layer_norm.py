"""LayerNorm, with the residual sum and LayerScale before it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._device import _refined_statistics, _row_statistics
from ._norm_backward import backward

__all__ = ["backward", "forward", "why_not"]


def why_not(x, residual, layer_scale, weight, bias, eps, sample_scale) -> str | None:
    return _device.why_not(x)


@triton.jit
def _sum_tile(x_ptr, residual_ptr, layer_scale_ptr, sample_scale_ptr, row, column, M, D, SAMPLE_ROWS,
              stride_xm, stride_rm, HAS_RESIDUAL: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
              HAS_SAMPLE_SCALE: tl.constexpr):  # fmt: skip
    """The residual sum, rounded to the inputs' dtype because that is what backward will see; 0 beyond D."""
    inside = (row < M)[:, None] & (column < D)[None, :]
    z = tl.load(x_ptr + row[:, None] * stride_xm + column[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    z = z.to(tl.float32)
    if HAS_RESIDUAL:
        if HAS_LAYER_SCALE:
            z *= tl.load(layer_scale_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        if HAS_SAMPLE_SCALE:
            sample_scale = tl.load(sample_scale_ptr + row // SAMPLE_ROWS, mask=row < M, other=0.0)  # [BLOCK_M]
            z *= sample_scale.to(tl.float32)[:, None]
        residual = tl.load(residual_ptr + row[:, None] * stride_rm + column[None, :], mask=inside, other=0.0)
        z = (z + residual.to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def _store_tile(z, mean, rstd, weight_ptr, bias_ptr, y_ptr, z_ptr, row, column, M, D,
                HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    y = (z - mean[:, None]) * rstd[:, None]  # [BLOCK_M, BLOCK_D]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    inside = (row < M)[:, None] & (column < D)[None, :]
    tl.store(y_ptr + row[:, None] * D + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_RESIDUAL:
        tl.store(z_ptr + row[:, None] * D + column[None, :], z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, layer_scale_ptr, sample_scale_ptr, weight_ptr, bias_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr,
    M, D, SAMPLE_ROWS, stride_xm, stride_rm, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_SAMPLE_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if ONE_TILE:
        z = _sum_tile(x_ptr, residual_ptr, layer_scale_ptr, sample_scale_ptr, row, column, M, D, SAMPLE_ROWS,
                      stride_xm, stride_rm, HAS_RESIDUAL, HAS_LAYER_SCALE, HAS_SAMPLE_SCALE)  # fmt: skip
        mean, rstd = _row_statistics(z, column[None, :], D, eps)
        _store_tile(z, mean, rstd, weight_ptr, bias_ptr, y_ptr, z_ptr, row, column, M, D,
                    HAS_RESIDUAL, HAS_WEIGHT, HAS_BIAS)  # fmt: skip
    else:
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            total += _sum_tile(x_ptr, residual_ptr, layer_scale_ptr, sample_scale_ptr, row, start + column,
                               M, D, SAMPLE_ROWS, stride_xm, stride_rm,
                               HAS_RESIDUAL, HAS_LAYER_SCALE, HAS_SAMPLE_SCALE)  # fmt: skip
        mean = tl.sum(total, axis=1) / D  # [BLOCK_M]
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            z = _sum_tile(x_ptr, residual_ptr, layer_scale_ptr, sample_scale_ptr, row, start + column,
                          M, D, SAMPLE_ROWS, stride_xm, stride_rm,
                          HAS_RESIDUAL, HAS_LAYER_SCALE, HAS_SAMPLE_SCALE)  # fmt: skip
            centred = tl.where((start + column < D)[None, :], z - mean[:, None], 0.0)
            total += centred
            squares += centred * centred
        mean, rstd = _refined_statistics(mean, tl.sum(total, axis=1), tl.sum(squares, axis=1), D, eps)
        for start in range(0, D, BLOCK_D):
            z = _sum_tile(x_ptr, residual_ptr, layer_scale_ptr, sample_scale_ptr, row, start + column,
                          M, D, SAMPLE_ROWS, stride_xm, stride_rm,
                          HAS_RESIDUAL, HAS_LAYER_SCALE, HAS_SAMPLE_SCALE)  # fmt: skip
            _store_tile(z, mean, rstd, weight_ptr, bias_ptr, y_ptr, z_ptr, row, start + column, M, D,
                        HAS_RESIDUAL, HAS_WEIGHT, HAS_BIAS)  # fmt: skip
    tl.store(mean_ptr + row, mean, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)


def forward(x, residual, layer_scale, weight, bias, eps, sample_scale):
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    z = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if y.numel() == 0:
        return y, z, mean, rstd
    aligned = _device.aligned(x, width, x.stride(0), 0 if residual is None else residual.stride(0))
    tile = _tuning.rows(width, x.element_size(), rows, aligned)
    sample_rows = 1 if sample_scale is None else rows // sample_scale.shape[0]
    with _device.on_device_of(x):
        _layer_norm_fwd_kernel[(triton.cdiv(rows, tile.BLOCK_M),)](
            x, residual, layer_scale, sample_scale, weight, bias, y, z, mean, rstd,
            rows, width, sample_rows, x.stride(0), 0 if residual is None else residual.stride(0), eps,
            HAS_RESIDUAL=residual is not None, HAS_LAYER_SCALE=layer_scale is not None,
            HAS_SAMPLE_SCALE=sample_scale is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            **vars(tile),
        )  # fmt: skip
    return y, z, mean, rstd
