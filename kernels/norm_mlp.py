"""LayerNorm -> Linear -> activation -> Linear -> LayerScale -> residual sum, in three launches.

The normalised input never reaches memory: row statistics first, then a product that normalises what it loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _matmul, _tuning
from ._device import _refined_statistics, _row_statistics


def why_not(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, eps, activation, residual, keep,
    sample_scale,
) -> str | None:
    return _device.why_not(x)


@triton.jit
def _norm_mlp_statistics_kernel(
    x_ptr, mean_ptr, rstd_ptr, M, D, stride_xm, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    x_rows = x_ptr + row[:, None] * stride_xm  # [BLOCK_M, 1]
    row_inside = row[:, None] < M
    columns = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    if ONE_TILE:
        x = tl.load(x_rows + columns, mask=row_inside & (columns < D), other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        mean, rstd = _row_statistics(x, columns, D, eps)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = row_inside & (start + columns < D)
            total += tl.load(x_rows + start + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=1) / D  # [BLOCK_M]
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = row_inside & (start + columns < D)
            x = tl.load(x_rows + start + columns, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(start + columns < D, x - mean[:, None], 0.0)
            total += centred
            squares += centred * centred
        mean, rstd = _refined_statistics(mean, tl.sum(total, axis=1), tl.sum(squares, axis=1), D, eps)
    tl.store(mean_ptr + row, mean, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)


def _statistics(x, eps):
    row_count, width = x.shape
    mean = torch.empty(row_count, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        tile = _tuning.rows(width)
        with _device.on_device_of(x):
            _norm_mlp_statistics_kernel[(triton.cdiv(row_count, tile.BLOCK_M),)](
                x, mean, rstd, row_count, width, x.stride(0), eps, **vars(tile)
            )
    return mean, rstd


def forward(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, eps, activation, residual, keep,
    sample_scale,
):
    mean, rstd = _statistics(x, eps)
    norm = (mean, rstd, norm_weight, norm_bias)
    hidden, preact = _matmul.linear(x, fc1_weight, fc1_bias, None, None, activation, keep, norm=norm)
    residual = x if residual else None
    y, _ = _matmul.linear(hidden, fc2_weight, fc2_bias, layer_scale, residual, "none", False, sample_scale)
    if not keep:
        mean, rstd = x.new_empty(0), x.new_empty(0)
    return y, mean, rstd, preact
