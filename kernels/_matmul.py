"""The matrix products behind linear and norm_mlp: forward, gradient of the input, gradient of the weight.

LayerNorm of the left side happens on the way in or in the epilogue, everything element-wise in the epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._device import _activate, _activation_grad, _grouped_tile


@triton.jit
def _normalise(x, mean, rstd, weight_ptr, bias_ptr, column, column_inside,
               HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """LayerNorm of a tile x [rows, columns], whose statistics are [rows, 1]."""
    h = (x.to(tl.float32) - mean) * rstd
    if HAS_WEIGHT:
        h *= tl.load(weight_ptr + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        h += tl.load(bias_ptr + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    return h.to(x.dtype)


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, bias_ptr, layer_scale_ptr, sample_scale_ptr, residual_ptr, y_ptr, preact_ptr, activated_ptr,
    mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, colsum_ptr,
    M, N, K, SAMPLE_ROWS, stride_xm, stride_w, stride_rm,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr,
    HAS_SAMPLE_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_PREACT: tl.constexpr, HAS_ACTIVATED: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_FOLD: tl.constexpr,
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
        depth = depth.to(tl.int64)
    x_block = x_ptr + m * stride_xm + (row[:, None] * stride_xm + depth[None, :])  # [BLOCK_M, BLOCK_K]
    if BACKWARD:
        weight_block = weight_ptr + n + (depth[:, None] * stride_w + column[None, :])  # [BLOCK_K, BLOCK_N]
        weight_step = stride_w.to(tl.int64)
    else:
        weight_block = weight_ptr + n * stride_w + (column[None, :] * stride_w + depth[:, None])  # [BLOCK_K, BLOCK_N]
        weight_step = 1
    if HAS_NORM or HAS_FOLD:
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
        weight = tl.load(weight_block + start * weight_step, mask=weight_mask, other=0.0)
        if HAS_NORM:
            # Columns beyond K need no care: they meet a zero of the weight.
            x = _normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, start + depth, depth_inside,
                           HAS_NORM_WEIGHT, HAS_NORM_BIAS)  # fmt: skip
        total = tl.dot(x, weight, total, input_precision="ieee")

    inside = row_inside[:, None] & column_inside[None, :]
    y_offset = m * N + n + (row[:, None] * N + column[None, :])  # [BLOCK_M, BLOCK_N]
    if HAS_FOLD:
        total = rstd * (total - mean * tl.load(colsum_ptr + n + column, mask=column_inside, other=0.0)[None, :])
    if HAS_BIAS:
        total += tl.load(bias_ptr + n + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        if HAS_PREACT:
            preact = tl.load(preact_ptr + y_offset, mask=inside, other=0.0).to(tl.float32)
            total *= _activation_grad(preact, ACTIVATION)
            if HAS_ACTIVATED:
                activated = _activate(preact, ACTIVATION).to(activated_ptr.dtype.element_ty)
                tl.store(activated_ptr + y_offset, activated, mask=inside)
    else:
        if HAS_PREACT:
            tl.store(preact_ptr + y_offset, total.to(preact_ptr.dtype.element_ty), mask=inside)
        total = _activate(total, ACTIVATION)
    if HAS_LAYER_SCALE:
        total *= tl.load(layer_scale_ptr + n + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if HAS_SAMPLE_SCALE:
        sample = (m + row) // SAMPLE_ROWS  # [BLOCK_M]
        total *= tl.load(sample_scale_ptr + sample, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        residual_block = residual_ptr + m * stride_rm + n + (row[:, None] * stride_rm + column[None, :])
        total += tl.load(residual_block, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + y_offset, total.to(y_ptr.dtype.element_ty), mask=inside)


def linear(
    x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale=None, norm=None, fold=None
):  # fmt: skip
    """linear.forward, and two ways to take LayerNorm of x on the fly.

    norm = (mean, rstd, norm_weight, norm_bias) normalises x as it is loaded. fold = (mean, rstd, colsum) does it to the
    product: the weight carries LayerNorm's weight already, colsum [N] (fp32) sums its rows, the bias carries W β.
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    preact = torch.empty_like(y) if keep_preact else x.new_empty(0)
    _product(
        x, weight, y, activation, bias=bias, layer_scale=layer_scale, sample_scale=sample_scale, residual=residual,
        preact=preact if keep_preact else None, norm=norm, fold=fold,
    )  # fmt: skip
    return y, preact


def grad_input(d, weight, preact=None, activation="none", keep_activated=False):
    """d (M, N) @ weight (N, K), times activation'(preact) where preact (M, K) is given: (dx, activation(preact)).

    keep_activated asks for the second, in the same pass over preact, as the right side of grad_weight; or it is empty.
    """
    dx = torch.empty((d.shape[0], weight.shape[1]), dtype=d.dtype, device=d.device)
    activated = torch.empty_like(dx) if keep_activated else d.new_empty(0)
    _product(
        d, weight, dx, activation, backward=True, preact=preact, activated=activated if keep_activated else None
    )  # fmt: skip
    return dx, activated


def _product(
    x, weight, y, activation, *, backward=False, bias=None, layer_scale=None, sample_scale=None, residual=None,
    preact=None, activated=None, norm=None, fold=None,
):  # fmt: skip
    """Launch _product_kernel into y (and preact or activated, which have its shape)."""
    row_count, depth = x.shape
    width = y.shape[1]
    if y.numel() == 0:
        return
    norm_weight = norm_bias = colsum = None
    mean, rstd, *rest = norm or fold or (None, None)
    if norm is not None:
        norm_weight, norm_bias = rest
    elif fold is not None:
        (colsum,) = rest
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    aligned = _device.aligned(x, depth, width if backward else depth, *strides)
    tile = _tuning.product(_device.chip(x), x.element_size(), row_count, aligned)
    grid = (triton.cdiv(row_count, tile.BLOCK_M) * triton.cdiv(width, tile.BLOCK_N),)
    with _device.on_device_of(x):
        _product_kernel[grid](
            x, weight, bias, layer_scale, sample_scale, residual, y, preact, activated,
            mean, rstd, norm_weight, norm_bias, colsum,
            row_count, width, depth, 1 if sample_scale is None else row_count // sample_scale.shape[0], *strides,
            BACKWARD=backward, ACTIVATION=activation, HAS_BIAS=bias is not None,
            HAS_LAYER_SCALE=layer_scale is not None, HAS_SAMPLE_SCALE=sample_scale is not None,
            HAS_RESIDUAL=residual is not None, HAS_PREACT=preact is not None, HAS_ACTIVATED=activated is not None,
            HAS_NORM=norm is not None, HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
            HAS_FOLD=fold is not None, EVEN_K=depth % tile.BLOCK_K == 0, WIDE=_device.wide((*strides, width)),
            GROUP_M=_tuning.GROUP_M, **vars(tile),
        )  # fmt: skip


@triton.jit
def _product_weight_kernel(
    d_ptr, x_ptr, dweight_ptr, dbias_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr,
    M, N, K, SPLIT_ROWS, stride_dm, stride_xm,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    WIDE: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Share of this split of the rows: dweight[split] = dᵀ x over its rows; the first column of tiles sums d too."""
    tile_n, tile_k = _grouped_tile(N, K, BLOCK_N, BLOCK_K, GROUP_M)
    split = tl.program_id(1)
    n = tile_n.to(tl.int64) * BLOCK_N
    k = tile_k.to(tl.int64) * BLOCK_K
    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    d_column = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    x_column = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    d_inside = n + d_column < N
    x_inside = k + x_column < K
    if WIDE:
        row = row.to(tl.int64)
    first = split.to(tl.int64) * SPLIT_ROWS
    d_block = d_ptr + first * stride_dm + n + (row[:, None] * stride_dm + d_column[None, :])  # [BLOCK_M, BLOCK_N]
    x_block = x_ptr + first * stride_xm + k + (row[:, None] * stride_xm + x_column[None, :])  # [BLOCK_M, BLOCK_K]
    row_count = tl.minimum(M - first, SPLIT_ROWS).to(tl.int32)

    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    bias_total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, row_count, BLOCK_M):
        row_inside = start + row < row_count
        step = tl.full([], start, tl.int64)
        d = tl.load(d_block + step * stride_dm, mask=row_inside[:, None] & d_inside[None, :], other=0.0)
        x = tl.load(x_block + step * stride_xm, mask=row_inside[:, None] & x_inside[None, :], other=0.0)
        if HAS_NORM:
            # Rows beyond the last need no care: they meet a zero of d.
            mean = tl.load(mean_ptr + first + start + row, mask=row_inside, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + first + start + row, mask=row_inside, other=0.0)[:, None]
            x = _normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, k + x_column, x_inside,
                           HAS_NORM_WEIGHT, HAS_NORM_BIAS)  # fmt: skip
        if ACTIVATION != "none":
            x = _activate(x.to(tl.float32), ACTIVATION).to(x.dtype)
        total = tl.dot(d.T, x, total, input_precision="ieee")
        if HAS_BIAS:
            if tile_k == 0:
                bias_total += tl.sum(d.to(tl.float32), axis=0)

    offset = split.to(tl.int64) * N * K + n * K + k + (d_column.to(tl.int64)[:, None] * K + x_column[None, :])
    inside = d_inside[:, None] & x_inside[None, :]
    tl.store(dweight_ptr + offset, total.to(dweight_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        if tile_k == 0:
            bias_block = dbias_ptr + split * N + n + d_column  # [BLOCK_N]
            tl.store(bias_block, bias_total.to(dbias_ptr.dtype.element_ty), mask=d_inside)


@triton.jit
def _partials_sum_kernel(partials_ptr, sum_ptr, SPLITS, COUNT, BLOCK: tl.constexpr):
    """sum[i] = Σ partials[split, i], in the order of the splits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = at < COUNT
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(SPLITS):
        total += tl.load(partials_ptr + at, mask=inside, other=0.0)
        partials_ptr += COUNT
    tl.store(sum_ptr + at, total.to(sum_ptr.dtype.element_ty), mask=inside)


def sum_partials(partials, dtype):
    """Sum of fp32 partials (S, ...) over their first dimension in fixed order, rounded once to dtype."""
    total = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    if total.numel():
        with _device.on_device_of(partials):
            _partials_sum_kernel[(triton.cdiv(total.numel(), _tuning.PARTIALS.BLOCK),)](
                partials, total, partials.shape[0], total.numel(), **vars(_tuning.PARTIALS)
            )
    return total


def grad_weight(d, x, bias, norm=None, activation="none"):
    """(dᵀ x', Σ d over rows if bias asks for it, else empty); x' is x, or its LayerNorm or activation taken on load.

    norm = (mean, rstd, norm_weight, norm_bias). Taking them on load costs the tile of x one pass through registers for
    every tile of d: where memory allows, materialise x' first (grad_input's keep_activated does).
    """
    row_count, width = d.shape
    depth = x.shape[1]
    mean, rstd, norm_weight, norm_bias = norm or (None, None, None, None)
    strides = (d.stride(0), x.stride(0))
    aligned = _device.aligned(d, width, depth, *strides)
    tile, splits = _tuning.weight_product(_device.chip(d), d.element_size(), row_count, width, depth, aligned)
    direct = splits == 1
    dtype = d.dtype if direct else torch.float32
    dweight = torch.empty((splits, width, depth), dtype=dtype, device=d.device)
    dbias = torch.empty((splits, width) if bias else (splits, 0), dtype=dtype, device=d.device)
    if row_count == 0 or dweight.numel() == 0:
        dbias = d.sum(0, dtype=torch.float32).to(d.dtype) if bias else d.new_empty(0)
        return d.new_zeros((width, depth)), dbias
    grid = (triton.cdiv(width, tile.BLOCK_N) * triton.cdiv(depth, tile.BLOCK_K), splits)
    with _device.on_device_of(d):
        _product_weight_kernel[grid](
            d, x, dweight, dbias, mean, rstd, norm_weight, norm_bias,
            row_count, width, depth, triton.cdiv(row_count, splits), *strides,
            ACTIVATION=activation, HAS_BIAS=bias, HAS_NORM=norm is not None,
            HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
            WIDE=_device.wide(strides), GROUP_M=_tuning.GROUP_M, **vars(tile),
        )  # fmt: skip
    if direct:
        return dweight[0], dbias[0]
    return sum_partials(dweight, d.dtype), sum_partials(dbias, d.dtype)
