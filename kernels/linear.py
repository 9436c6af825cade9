"""Linear layer with bias, activation, LayerScale, stochastic depth and residual sum in the epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _matmul, _tuning
from ._device import _activate, _activation_grad, _power_of


def why_not(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale) -> str | None:
    return _device.why_not(x)


def forward(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale):
    return _matmul.linear(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale)


@triton.jit
def _linear_bwd_kernel(
    dy_ptr, preact_ptr, layer_scale_ptr, sample_scale_ptr, d_ptr, bias_parts_ptr, scale_parts_ptr,
    M, N, SAMPLE_ROWS, PROGRAM_ROWS, stride_ym,
    ACTIVATION: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_SAMPLE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d, the gradient of the product, from dy [BLOCK_M, BLOCK_N] at a time, PROGRAM_ROWS down a band of columns.

    With an activation also this program's share of bias's gradient, Σ d, and of LayerScale's. Without one those come
    from the weight's gradient, and LayerScale gives d no more than its power of two.
    """
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    first = tl.program_id(0) * PROGRAM_ROWS
    if HAS_LAYER_SCALE:
        scale = tl.load(layer_scale_ptr + column, mask=column < N, other=0.0).to(tl.float32)
        if ACTIVATION == "none":
            scale = _power_of(scale)
    bias_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    scale_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(first, tl.minimum(M, first + PROGRAM_ROWS), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]  # [BLOCK_M, 1]
        inside = (row < M) & (column < N)
        d = tl.load(dy_ptr + row * stride_ym + column, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if HAS_SAMPLE_SCALE:
            d *= tl.load(sample_scale_ptr + row // SAMPLE_ROWS, mask=row < M, other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            preact = tl.load(preact_ptr + row * N + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_LAYER_SCALE:
                scale_total += d * _activate(preact, ACTIVATION)
            d *= _activation_grad(preact, ACTIVATION)
        if HAS_LAYER_SCALE:
            d *= scale
        bias_total += d
        tl.store(d_ptr + row * N + column, d.to(d_ptr.dtype.element_ty), mask=inside)
    if ACTIVATION != "none":
        part = tl.program_id(0).to(tl.int64) * N + column
        tl.store(bias_parts_ptr + part, tl.sum(bias_total, axis=0)[None, :], mask=column < N)
        if HAS_LAYER_SCALE:
            tl.store(scale_parts_ptr + part, tl.sum(scale_total, axis=0)[None, :], mask=column < N)


def _product_gradient(dy, preact, layer_scale, sample_scale, activation):
    """(d, dbias, dlayer_scale) of `_linear_bwd_kernel`, the sums None where it has none."""
    row_count, width = dy.shape
    d = torch.empty((row_count, width), dtype=dy.dtype, device=dy.device)
    if d.numel() == 0:
        return d, dy.new_zeros(width), None if layer_scale is None else dy.new_zeros(width)
    tile, programs = _tuning.product_gradient(width, _device.processors(dy))
    program_rows = triton.cdiv(row_count, programs * tile.BLOCK_M) * tile.BLOCK_M
    grid = triton.cdiv(row_count, program_rows), triton.cdiv(width, tile.BLOCK_N)
    preact = None if activation == "none" else preact.contiguous()
    sums = activation != "none", activation != "none" and layer_scale is not None
    parts = [torch.empty((grid[0], width), dtype=torch.float32, device=dy.device) if s else None for s in sums]
    with _device.on_device_of(dy):
        _linear_bwd_kernel[grid](
            dy, preact, layer_scale, sample_scale, d, *parts,
            row_count, width, 1 if sample_scale is None else row_count // sample_scale.shape[0], program_rows,
            dy.stride(0), ACTIVATION=activation, HAS_LAYER_SCALE=layer_scale is not None,
            HAS_SAMPLE_SCALE=sample_scale is not None, **vars(tile),
        )  # fmt: skip
    return d, *(None if p is None else _matmul.sum_partials(p, dy.dtype) for p in parts)


def backward(dy, x, weight, bias, layer_scale, preact, activation, sample_scale):
    """Gradients (dx, dweight, dbias, dlayer_scale); what there is none of is empty.

    LayerScale without an activation goes into the weight, which is smaller than dy, and its gradient comes from the
    weight's: nothing is kept or computed again, and both products read dy itself. In fp16 a scale of 1e-5 would be lost
    in the weight, so its power of two goes into dy, whose range the caller's loss scaling looks after.
    """
    dy = _device.readable(dy)
    d, dbias, dscale = dy, dy.new_empty(0), dy.new_empty(0)
    if activation != "none":
        d, dbias, sums = _product_gradient(dy, preact, layer_scale, sample_scale, activation)
        dweight, _ = _matmul.grad_weight(d, x, False)
        dscale = dscale if sums is None else sums
    else:
        power = layer_scale is not None and dy.dtype == torch.float16
        if power or sample_scale is not None:
            d, _, _ = _product_gradient(dy, None, layer_scale if power else None, sample_scale, "none")
        if layer_scale is None:
            dweight, dbias = _matmul.grad_weight(d, x, bias is not None)
        else:
            weight, dweight, dbias, dscale = _matmul.grad_scaled_weight(d, x, weight, bias, layer_scale, power)
    return _matmul.grad_input(d, weight)[0], dweight, dbias if bias is not None else dy.new_empty(0), dscale
