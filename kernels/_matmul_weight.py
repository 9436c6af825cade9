"""The gradient of a weight, dᵀ x, and of what is summed along the same rows: bias and LayerScale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _device, _tuning
from ._device import _activate, _grouped_tile, _normalise, _power_of


@triton.jit
def _product_weight_kernel(
    d, x, d_ptr, dweight_ptr, dbias_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr,
    M, N, K, SPLIT_M, stride_dm, stride_xm,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dweight[split] (N, K) = dᵀ x over the split's rows, and dbias[split, tile of K] (N,), a share of the sum of d.

    The programs of one row of tiles load the same d: each adds every so many-th block of it to the bias, in turn.
    """
    tile_n, tile_k = _grouped_tile(N, K, BLOCK_N, BLOCK_K, GROUP_M)
    split = tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    n = tile_n.to(tl.int64) * BLOCK_N
    k = tile_k.to(tl.int64) * BLOCK_K
    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    d_column = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    x_column = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    d_inside = n + d_column < N
    x_inside = k + x_column < K
    at = row.to(tl.int64) if WIDE else row
    d_block = d_ptr + n + (at[:, None] * stride_dm + d_column[None, :])  # [BLOCK_M, BLOCK_N]
    if not DESCRIPTORS:
        x_block = x + k + (at[:, None] * stride_xm + x_column[None, :])  # [BLOCK_M, BLOCK_K]

    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    bias_total = tl.zeros([16, BLOCK_N], tl.float32)
    first = split * SPLIT_M
    for m in range(first, tl.minimum(M, first + SPLIT_M), BLOCK_M):
        row_inside = m + row < M
        start = tl.full([], m, tl.int64)
        if DESCRIPTORS:
            d_tile = d.load([m, tile_n * BLOCK_N])  # [BLOCK_M, BLOCK_N]
            x_tile = x.load([m, tile_k * BLOCK_K])  # [BLOCK_M, BLOCK_K]
        else:
            d_tile = tl.load(d_block + start * stride_dm, mask=row_inside[:, None] & d_inside[None, :], other=0.0)
            x_tile = tl.load(x_block + start * stride_xm, mask=row_inside[:, None] & x_inside[None, :], other=0.0)
        if HAS_NORM:
            # Rows beyond the last need no care: they meet a zero of d.
            mean = tl.load(mean_ptr + m + row, mask=row_inside, other=0.0)[:, None]  # [BLOCK_M, 1]
            rstd = tl.load(rstd_ptr + m + row, mask=row_inside, other=0.0)[:, None]  # [BLOCK_M, 1]
            x_tile = _normalise(x_tile, mean, rstd, norm_weight_ptr, norm_bias_ptr, k + x_column, x_inside)
        if ACTIVATION != "none":
            x_tile = _activate(x_tile.to(tl.float32), ACTIVATION).to(x_tile.dtype)
        total = tl.dot(d_tile.T, x_tile, total, input_precision="ieee")
        if HAS_BIAS:
            # Loaded again: a tile that feeds a sum beside the matrix unit gets one buffer too few from Triton 3.7, and
            # the next copy but one overwrites it while the matrix unit still reads.
            wanted = row_inside & ((m // BLOCK_M) % tiles_k == tile_k)
            again = tl.load(d_block + start * stride_dm, mask=wanted[:, None] & d_inside[None, :], other=0.0)
            bias_total += tl.sum(tl.reshape(again.to(tl.float32), (BLOCK_M // 16, 16, BLOCK_N)), axis=0)

    offset = split.to(tl.int64) * N * K + n * K + k + (d_column.to(tl.int64)[:, None] * K + x_column[None, :])
    inside = d_inside[:, None] & x_inside[None, :]
    tl.store(dweight_ptr + offset, total.to(dweight_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        bias_block = dbias_ptr + (split * tiles_k + tile_k) * N + n + d_column  # [BLOCK_N]
        tl.store(bias_block, tl.sum(bias_total, axis=0), mask=d_inside)


@triton.jit
def _product_weight_sum_kernel(
    parts_ptr, bias_parts_ptr, weight_ptr, bias_ptr, layer_scale_ptr,
    dweight_ptr, dbias_ptr, scaled_ptr, dlayer_scale_ptr, N, K, SPLITS, BIAS_SPLITS, stride_w,
    HAS_PARTS: tl.constexpr, HAS_BIAS_PARTS: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    POWER: tl.constexpr, BLOCK_S: tl.constexpr, UNROLL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of the weight: the parts of its gradient G, and of the sum g of d, added in their order.

    With LayerScale: dweight = scale G, dbias = scale g, dlayer_scale = Σ_k W G + b g, so that nobody keeps the output;
    scaled = scale W makes d W the gradient of x. If d carries the scale's power of two, only the rest is left to do.
    """
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    if HAS_LAYER_SCALE:
        scale = tl.load(layer_scale_ptr + n).to(tl.float32)
        power = _power_of(scale) if POWER else 1.0
        rest = scale / power
        products = tl.zeros([BLOCK_K], tl.float32)
    if HAS_PARTS:
        for start in range(0, K, BLOCK_K):
            k = start + column  # [BLOCK_K]
            total = tl.zeros([BLOCK_K], tl.float32)
            for first in range(0, SPLITS, UNROLL):
                for split in tl.static_range(UNROLL):
                    part = parts_ptr + (tl.full([], first + split, tl.int64) * N + n) * K
                    total += tl.load(part + k, mask=(k < K) & (first + split < SPLITS), other=0.0).to(tl.float32)
            if HAS_LAYER_SCALE:
                weight = tl.load(weight_ptr + n * stride_w + k, mask=k < K, other=0.0).to(tl.float32)
                products += weight * total
                total *= rest
                tl.store(scaled_ptr + n * K + k, (rest * weight).to(scaled_ptr.dtype.element_ty), mask=k < K)
            tl.store(dweight_ptr + n * K + k, total.to(dweight_ptr.dtype.element_ty), mask=k < K)
    if HAS_BIAS_PARTS:
        at = tl.arange(0, BLOCK_S)  # [BLOCK_S]
        shares = tl.load(bias_parts_ptr + at.to(tl.int64) * N + n, mask=at < BIAS_SPLITS, other=0.0)
        total_bias = tl.sum(shares, axis=0)
        if HAS_LAYER_SCALE:
            tl.store(dbias_ptr + n, (rest * total_bias).to(dbias_ptr.dtype.element_ty))
        else:
            tl.store(dbias_ptr + n, total_bias.to(dbias_ptr.dtype.element_ty))
    if HAS_LAYER_SCALE:
        dlayer_scale = tl.sum(products, axis=0)
        if HAS_BIAS:
            dlayer_scale += tl.load(bias_ptr + n).to(tl.float32) * total_bias
        tl.store(dlayer_scale_ptr + n, (dlayer_scale / power).to(dlayer_scale_ptr.dtype.element_ty))


def grad_weight(d, x, bias, norm=None, activation="none"):
    """(dᵀ x', Σ d over rows if bias asks for it, else empty); x' is x, or its LayerNorm or activation taken on load.

    norm = (mean, rstd, norm_weight, norm_bias). Taking them on load costs the tile of x one pass through registers for
    every tile of d: where memory allows, materialise x' first (grad_input's keep_activated does).
    """
    width, depth = d.shape[1], x.shape[1]
    parts, bias_parts = _parts(d, x, bias, norm, activation, False)
    whole = len(parts) == 1
    dweight = parts[0] if whole else torch.empty((width, depth), dtype=d.dtype, device=d.device)
    dbias = torch.empty(width, dtype=d.dtype, device=d.device) if bias else d.new_empty(0)
    if bias or not whole:
        _sum(None if whole else parts, bias_parts if bias else None, dweight, dbias)
    return dweight, dbias


def sum_partials(parts, dtype):
    """Σ parts (S, N) or (S, N, ...) over S, in fixed order, rounded once to dtype."""
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if parts.dim() == 2:
        _sum(None, parts, None, total)
    else:
        _sum(parts.flatten(2), None, total.flatten(1), None)
    return total


def grad_scaled_weight(d, x, weight, bias, layer_scale, power=False):
    """Of y = layer_scale * (x Wᵀ + b), for y's gradient d: (layer_scale * W, dweight, dbias, dlayer_scale).

    power says that d has been given the power of two of each scale (`_device._power_of`) already.
    """
    parts, bias_parts = _parts(d, x, True, None, "none", True)
    scaled, dweight = (torch.empty(weight.shape, dtype=d.dtype, device=d.device) for _ in range(2))
    dbias, dlayer_scale = (torch.empty(weight.shape[0], dtype=d.dtype, device=d.device) for _ in range(2))
    _sum(parts, bias_parts, dweight, dbias, scaled, dlayer_scale, weight, bias, layer_scale, power)
    return scaled, dweight, dbias, dlayer_scale


def _parts(d, x, bias, norm, activation, unrounded):
    """Shares (S, N, K) of dᵀ x' and (S', N) of the sum of d. A single share has d's dtype unless unrounded is asked."""
    (row_count, width), depth = d.shape, x.shape[1]
    float32 = {"dtype": torch.float32, "device": d.device}
    if d.numel() == 0 or depth == 0:
        dtype = torch.float32 if unrounded else d.dtype
        return d.new_zeros((1, width, depth), dtype=dtype), d.sum(0, keepdim=True, dtype=torch.float32)
    d, x = _device.readable(d), _device.readable(x)
    chip, sizes = _device.chip(d), (row_count, width, depth)
    if norm is None and activation == "none" and _tuning.library("weight", chip, d.element_size(), *sizes):
        return torch.mm(d.t(), x)[None], d.sum(0, keepdim=True, dtype=torch.float32) if bias else d.new_empty(0)
    mean, rstd, norm_weight, norm_bias = norm or (None, None, None, None)
    strides = d.stride(0), x.stride(0)
    tile, splits = _tuning.matmul_weight(chip, d.element_size(), *sizes, _device.aligned(d, width, depth, *strides))
    split_rows = triton.cdiv(row_count, splits * tile.BLOCK_M) * tile.BLOCK_M
    splits, tiles_k = triton.cdiv(row_count, split_rows), triton.cdiv(depth, tile.BLOCK_K)
    if splits == 1 and not unrounded:
        parts = torch.empty((1, width, depth), dtype=d.dtype, device=d.device)
    else:
        parts = torch.empty((splits, width, depth), **float32)
    bias_parts = torch.empty((splits * tiles_k if bias else 0, width), **float32)
    matrices = d, x
    if tile.DESCRIPTORS:
        matrices = (
            TensorDescriptor.from_tensor(d, [tile.BLOCK_M, tile.BLOCK_N]),
            TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K]),
        )
    with _device.on_device_of(d):
        _product_weight_kernel[(triton.cdiv(width, tile.BLOCK_N) * tiles_k, splits)](
            *matrices, d, parts, bias_parts, mean, rstd, norm_weight, norm_bias, *sizes, split_rows, *strides,
            ACTIVATION=activation, HAS_BIAS=bias, HAS_NORM=norm is not None,
            WIDE=_device.wide(strides), **vars(tile),
        )  # fmt: skip
    return parts, bias_parts


def _sum(
    parts, bias_parts, dweight, dbias, scaled=None, dlayer_scale=None, weight=None, bias=None, layer_scale=None,
    power=False,
):  # fmt: skip
    width, depth = (dbias.shape[0], 0) if dweight is None else dweight.shape
    if width == 0:
        return
    shares = 0 if bias_parts is None else bias_parts.shape[0]
    with _device.on_device_of(dbias if dweight is None else dweight):
        _product_weight_sum_kernel[(width,)](
            parts, bias_parts, weight, bias, layer_scale, dweight, dbias, scaled, dlayer_scale,
            width, depth, 1 if parts is None else parts.shape[0], shares, 0 if weight is None else weight.stride(0),
            HAS_PARTS=parts is not None, HAS_BIAS_PARTS=bias_parts is not None,
            HAS_LAYER_SCALE=layer_scale is not None, HAS_BIAS=bias is not None, POWER=power,
            BLOCK_S=triton.next_power_of_2(max(shares, 1)), **vars(_tuning.WEIGHT_SUM),
        )  # fmt: skip
