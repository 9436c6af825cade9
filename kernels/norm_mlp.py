"""LayerNorm -> Linear -> activation -> Linear -> LayerScale -> stochastic depth -> residual sum, forward and backward.

Narrow rows take one kernel (_norm_mlp). Others take two products, and the normalised input still never reaches memory:
row statistics first, then a product that applies them, to what it loads or (folded) to what it has summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _matmul, _norm_backward, _norm_mlp, _tuning
from ._device import _activate, _power_of, _refined_statistics, _row_statistics


def why_not(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, eps, activation, residual, keep,
    sample_scale,
) -> str | None:  # fmt: skip
    return _device.why_not(x)


@triton.jit
def _norm_mlp_statistics_kernel(
    x_ptr, mean_ptr, rstd_ptr, fold_rstd_ptr, M, D, stride_xm, eps,
    HAS_FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    x_rows = x_ptr + row[:, None] * stride_xm  # [BLOCK_M, 1]
    row_inside = row[:, None] < M
    columns = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    first = tl.load(x_rows, mask=row_inside, other=0.0).to(tl.float32)  # [BLOCK_M, 1]
    if ONE_TILE:
        x = tl.load(x_rows + columns, mask=row_inside & (columns < D), other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        mean, rstd = _row_statistics(x, columns, D, eps)
        differs = ((x != first) & (columns < D)).to(tl.int32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = row_inside & (start + columns < D)
            total += tl.load(x_rows + start + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=1) / D  # [BLOCK_M]
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        differs = tl.zeros([BLOCK_M, BLOCK_D], tl.int32)
        for start in range(0, D, BLOCK_D):
            inside = row_inside & (start + columns < D)
            x = tl.load(x_rows + start + columns, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(start + columns < D, x - mean[:, None], 0.0)
            total += centred
            squares += centred * centred
            differs += ((x != first) & (start + columns < D)).to(tl.int32)
        mean, rstd = _refined_statistics(mean, tl.sum(total, axis=1), tl.sum(squares, axis=1), D, eps)
    tl.store(mean_ptr + row, mean, mask=row < M)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    if HAS_FOLD:
        # A row of one value is normalised to 0, but folded to the rounding of its sums times 1/sqrt(eps).
        fold_rstd = tl.where(tl.max(differs, axis=1) == 0, 0.0 * rstd, rstd)
        tl.store(fold_rstd_ptr + row, fold_rstd, mask=row < M)


def _statistics(x, eps, fold):
    """Mean and 1/sqrt(variance + eps) of x's rows, and the latter as fold wants it (None if nothing is folded)."""
    row_count, width = x.shape
    mean = torch.empty(row_count, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    fold_rstd = torch.empty_like(mean) if fold else None
    if x.numel():
        tile = _tuning.rows(width, x.element_size())
        with _device.on_device_of(x):
            _norm_mlp_statistics_kernel[(triton.cdiv(row_count, tile.BLOCK_M),)](
                x, mean, rstd, fold_rstd, row_count, width, x.stride(0), eps, HAS_FOLD=fold, **vars(tile)
            )
    return mean, rstd, fold_rstd


@triton.jit
def _norm_mlp_fold_kernel(
    fc1_ptr, fc1_bias_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr, colsum_ptr, shift_ptr, F, D, stride_1,
    HAS_FC1_BIAS: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """folded = W₁ γ in its dtype, colsum = Σ folded, shift = b₁ + W₁ β."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    shifts = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + column[None, :]  # [1, BLOCK_D]
        inside = (n[:, None] < F) & (columns < D)
        weight = tl.load(fc1_ptr + n[:, None] * stride_1 + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM_BIAS:
            shifts += weight * tl.load(norm_bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        if HAS_NORM_WEIGHT:
            weight *= tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
            folded = weight.to(folded_ptr.dtype.element_ty)
            tl.store(folded_ptr + n[:, None] * D + columns, folded, mask=inside)
            weight = folded.to(tl.float32)
        sums += weight
    shift = tl.sum(shifts, axis=1)  # [BLOCK_N]
    if HAS_FC1_BIAS:
        shift += tl.load(fc1_bias_ptr + n, mask=n < F, other=0.0).to(tl.float32)
    tl.store(colsum_ptr + n, tl.sum(sums, axis=1), mask=n < F)
    tl.store(shift_ptr + n, shift, mask=n < F)


def _fold(norm_weight, norm_bias, fc1_weight, fc1_bias):
    """fc1 as it meets rows that are not normalised: (weight, sums of its rows, bias), the last two in fp32."""
    hidden, width = fc1_weight.shape
    dtype, device = fc1_weight.dtype, fc1_weight.device
    folded = fc1_weight if norm_weight is None else torch.empty((hidden, width), dtype=dtype, device=device)
    colsum = torch.empty(hidden, dtype=torch.float32, device=device)
    shift = torch.empty_like(colsum)
    tile = _tuning.FOLD
    with _device.on_device_of(fc1_weight):
        _norm_mlp_fold_kernel[(triton.cdiv(hidden, tile.BLOCK_N),)](
            fc1_weight, fc1_bias, norm_weight, norm_bias, folded, colsum, shift, hidden, width, fc1_weight.stride(0),
            HAS_FC1_BIAS=fc1_bias is not None, HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_NORM_BIAS=norm_bias is not None, **vars(tile),
        )  # fmt: skip
    return folded, colsum, shift


def forward(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, eps, activation, residual, keep,
    sample_scale,
):  # fmt: skip
    tile = _norm_mlp.tile_for(x, fc1_weight, fc2_weight)
    if tile is not None:
        return _norm_mlp.forward(
            tile, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, eps, activation,
            residual, keep, sample_scale,
        )  # fmt: skip
    # What cancels in a folded product is mean/sd times fp32's rounding. bf16 cannot represent rows for which that shows
    # beside its own; fp16 can, from mean/sd of 5,000 on.
    fold = x.dtype == torch.bfloat16 and _tuning.folds(x.shape[0], *fc1_weight.shape)
    mean, rstd, fold_rstd = _statistics(x, eps, fold)
    if fold:
        folded, colsum, shift = _fold(norm_weight, norm_bias, fc1_weight, fc1_bias)
        fold = (mean, fold_rstd, colsum)
        hidden, preact = _matmul.linear(x, folded, shift, None, None, activation, keep, fold=fold)
    else:
        norm = (mean, rstd, norm_weight, norm_bias)
        hidden, preact = _matmul.linear(x, fc1_weight, fc1_bias, None, None, activation, keep, norm=norm)
    residual = x if residual else None
    y, _ = _matmul.linear(hidden, fc2_weight, fc2_bias, layer_scale, residual, "none", False, sample_scale)
    if not keep:
        mean, rstd = x.new_empty(0), x.new_empty(0)
    return y, mean, rstd, preact


@triton.jit
def _norm_mlp_elements_kernel(
    x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, sample_scale_ptr, layer_scale_ptr, y_ptr,
    M, D, SAMPLE_ROWS, stride_xm,
    ACTIVATION: tl.constexpr, HAS_NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_SAMPLE_SCALE: tl.constexpr, HAS_POWER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What backward needs again or first, element by element: activations, normalised rows, a scaled gradient."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows = row[:, None]  # [BLOCK_M, 1]
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    inside = (rows < M) & (columns < D)
    x = tl.load(x_ptr + rows * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if HAS_NORM:
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        x = (x - mean[:, None]) * rstd[:, None]
        if HAS_NORM_WEIGHT:
            x *= tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        if HAS_NORM_BIAS:
            x += tl.load(norm_bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    x = _activate(x, ACTIVATION)
    if HAS_SAMPLE_SCALE:
        x *= tl.load(sample_scale_ptr + rows // SAMPLE_ROWS, mask=rows < M, other=0.0).to(tl.float32)
    if HAS_POWER:
        x *= _power_of(tl.load(layer_scale_ptr + columns, mask=columns < D, other=0.0).to(tl.float32))
    tl.store(y_ptr + rows * D + columns, x.to(y_ptr.dtype.element_ty), mask=inside)


def _elements(x, *, activation="none", norm=None, sample_scale=None, power_of=None):
    row_count, width = x.shape
    y = torch.empty((row_count, width), dtype=x.dtype, device=x.device)
    mean, rstd, norm_weight, norm_bias = norm or (None, None, None, None)
    if y.numel() == 0:
        return y
    tile = _tuning.elements(width)
    with _device.on_device_of(x):
        _norm_mlp_elements_kernel[(triton.cdiv(row_count, tile.BLOCK_M), triton.cdiv(width, tile.BLOCK_D))](
            x, mean, rstd, norm_weight, norm_bias, sample_scale, power_of, y,
            row_count, width, 1 if sample_scale is None else row_count // sample_scale.shape[0], x.stride(0),
            ACTIVATION=activation, HAS_NORM=norm is not None, HAS_NORM_WEIGHT=norm_weight is not None,
            HAS_NORM_BIAS=norm_bias is not None, HAS_SAMPLE_SCALE=sample_scale is not None,
            HAS_POWER=power_of is not None, **vars(tile),
        )  # fmt: skip
    return y


def backward(
    dy, x, norm_weight, norm_bias, fc1_weight, fc2_weight, fc2_bias, layer_scale, mean, rstd, preact, activation,
    residual, sample_scale,
):  # fmt: skip
    """Gradients (dx, dnorm_weight, dnorm_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dlayer_scale).

    At most one matrix as large as preact is alive beside it: the activations are made and gone before its gradient is.
    """
    dy = _device.readable(dy)
    # As in linear's backward: LayerScale goes into fc2's weight, in fp16 a part of it into dy.
    power = layer_scale is not None and dy.dtype == torch.float16
    d = dy
    if power or sample_scale is not None:
        d = _elements(dy, sample_scale=sample_scale, power_of=layer_scale if power else None)
    # Made once: on every load they would be made again for each tile of the gradient along the other axis. On an H200
    # GELU (20 instructions) takes as long as its way to memory and back, 0.9 ps an element, and LayerNorm a fifth.
    activated = _elements(preact, activation=activation)
    dlayer_scale = x.new_empty(0)
    if layer_scale is None:
        dfc2, dfc2_bias = _matmul.grad_weight(d, activated, True)
    else:
        fc2_weight, dfc2, dfc2_bias, dlayer_scale = _matmul.grad_scaled_weight(
            d, activated, fc2_weight, fc2_bias, layer_scale, power
        )
    del activated
    dpreact, _ = _matmul.grad_input(d, fc2_weight, preact, activation)
    del d, fc2_weight
    normalised = _elements(x, norm=(mean, rstd, norm_weight, norm_bias))
    dfc1, dfc1_bias = _matmul.grad_weight(dpreact, normalised, True)
    del normalised
    dnormalised, _ = _matmul.grad_input(dpreact, fc1_weight)
    del dpreact
    dz = dy if residual else None
    dx, _, _, dnorm_weight, dnorm_bias = _norm_backward.backward(
        dnormalised, dz, x, mean, rstd, norm_weight, None, None, None
    )
    return dx, dnorm_weight, dnorm_bias, dfc1, dfc1_bias, dfc2, dfc2_bias, dlayer_scale
