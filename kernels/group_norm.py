"""GroupNorm and ReLU: a program has one group of one sample, which it walks in tiles of channels by positions.

Either of the two dimensions may be the one whose numbers lie side by side. A group is read once for its mean, again for
its variance and again for the result: it is small enough that the caches hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning
from ._device import _refined_statistics
from ._norm_backward import _layer_norm_bwd_sum_kernel


def why_not(x, num_groups, weight, bias, eps, relu) -> str | None:
    if x.shape[1] * x.shape[2] >= 1 << 31:
        return f"triton: takes samples of fewer than 2^31 numbers, got {x.shape[1]} x {x.shape[2]}"
    return _device.why_not(x)


@triton.jit
def _tile(base_ptr, channel, position, CHANNELS, POSITIONS, stride_c, stride_p):
    """Channels [BLOCK_C] by positions [BLOCK_P] of a group in fp32, 0 beyond the last."""
    inside = (channel < CHANNELS)[:, None] & (position < POSITIONS)[None, :]
    at = channel[:, None] * stride_c + position[None, :] * stride_p
    return tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(base_ptr, tile, channel, position, CHANNELS, POSITIONS, stride_c, stride_p):
    inside = (channel < CHANNELS)[:, None] & (position < POSITIONS)[None, :]
    at = channel[:, None] * stride_c + position[None, :] * stride_p
    tl.store(base_ptr + at, tile.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _parameter(vector_ptr, first, channel, CHANNELS, ABSENT: tl.constexpr, PRESENT: tl.constexpr):
    """One parameter of a group's channels [BLOCK_C] in fp32, or what an absent one amounts to."""
    if PRESENT:
        return tl.load(vector_ptr + first + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    return tl.full([channel.shape[0]], ABSENT, tl.float32)


@triton.jit
def _passed(value, result):
    """What ReLU lets through: NaN too, as PyTorch's does forwards and backwards."""
    return tl.where(result <= 0.0, 0.0, value)


@triton.jit
def _group_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    GROUPS, CHANNELS, POSITIONS, stride_xb, stride_yb, stride_c, stride_p, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    sample, first = unit // GROUPS, unit % GROUPS * CHANNELS
    x_ptr += sample * stride_xb + first * stride_c
    y_ptr += sample * stride_yb + first * stride_c
    channel = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    position = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    size = CHANNELS * POSITIONS
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        for p in range(0, POSITIONS, BLOCK_P):
            total += _tile(x_ptr, c + channel, p + position, CHANNELS, POSITIONS, stride_c, stride_p)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / size
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        for p in range(0, POSITIONS, BLOCK_P):
            x = _tile(x_ptr, c + channel, p + position, CHANNELS, POSITIONS, stride_c, stride_p)
            inside = (c + channel < CHANNELS)[:, None] & (p + position < POSITIONS)[None, :]
            centred = tl.where(inside, x - mean, 0.0)
            total += centred
            squares += centred * centred
    missed, spread = tl.sum(tl.sum(total, axis=1), axis=0), tl.sum(tl.sum(squares, axis=1), axis=0)
    mean, rstd = _refined_statistics(mean, missed, spread, size, eps)
    tl.store(mean_ptr + unit, mean)
    tl.store(rstd_ptr + unit, rstd)
    for c in range(0, CHANNELS, BLOCK_C):
        scale = rstd * _parameter(weight_ptr, first, c + channel, CHANNELS, 1.0, HAS_WEIGHT)  # [BLOCK_C]
        bias = _parameter(bias_ptr, first, c + channel, CHANNELS, 0.0, HAS_BIAS)
        for p in range(0, POSITIONS, BLOCK_P):
            x = _tile(x_ptr, c + channel, p + position, CHANNELS, POSITIONS, stride_c, stride_p)
            y = (x - mean) * scale[:, None] + bias[:, None]
            if RELU:
                y = _passed(y, y)
            _store_tile(y_ptr, y, c + channel, p + position, CHANNELS, POSITIONS, stride_c, stride_p)


@triton.jit
def _upstream(dy_ptr, x_ptr, mean, scale, bias, channel, position, CHANNELS, POSITIONS, stride_c, stride_p,
              RELU: tl.constexpr):  # fmt: skip
    """x less its mean, and the gradient that came through the ReLU there; this is 0 beyond the group."""
    centred = _tile(x_ptr, channel, position, CHANNELS, POSITIONS, stride_c, stride_p) - mean
    u = _tile(dy_ptr, channel, position, CHANNELS, POSITIONS, stride_c, stride_p)
    if RELU:
        u = _passed(u, centred * scale[:, None] + bias[:, None])
    return centred, u


@triton.jit
def _group_norm_bwd_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dx_ptr, partials_ptr,
    GROUPS, CHANNELS, POSITIONS, stride_dyb, stride_xb, stride_dxb, stride_c, stride_p, stride_partial,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx, and this sample's share of dweight and dbias, one line of each of the two tables of partials."""
    unit = tl.program_id(0).to(tl.int64)
    sample, first = unit // GROUPS, unit % GROUPS * CHANNELS
    dy_ptr += sample * stride_dyb + first * stride_c
    x_ptr += sample * stride_xb + first * stride_c
    dx_ptr += sample * stride_dxb + first * stride_c
    partials_ptr += sample * GROUPS * CHANNELS + first
    mean, rstd = tl.load(mean_ptr + unit), tl.load(rstd_ptr + unit)
    channel = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    position = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    level = tl.zeros([BLOCK_C], tl.float32)
    slope = tl.zeros([BLOCK_C], tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        weight = _parameter(weight_ptr, first, c + channel, CHANNELS, 1.0, HAS_WEIGHT)  # [BLOCK_C]
        bias = _parameter(bias_ptr, first, c + channel, CHANNELS, 0.0, HAS_BIAS)
        along = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for p in range(0, POSITIONS, BLOCK_P):
            centred, u = _upstream(dy_ptr, x_ptr, mean, rstd * weight, bias, c + channel, p + position,
                                   CHANNELS, POSITIONS, stride_c, stride_p, RELU)  # fmt: skip
            along += u * centred
            total += u
        dweight, dbias = tl.sum(along, axis=1) * rstd, tl.sum(total, axis=1)  # [BLOCK_C]
        tl.store(partials_ptr + c + channel, dweight, mask=c + channel < CHANNELS)
        tl.store(partials_ptr + stride_partial + c + channel, dbias, mask=c + channel < CHANNELS)
        slope += tl.where(c + channel < CHANNELS, weight * dweight, 0.0)
        level += tl.where(c + channel < CHANNELS, weight * dbias, 0.0)
    size = CHANNELS * POSITIONS
    level_mean, slope_mean = tl.sum(level, axis=0) / size * rstd, tl.sum(slope, axis=0) / size * rstd * rstd
    for c in range(0, CHANNELS, BLOCK_C):
        scale = rstd * _parameter(weight_ptr, first, c + channel, CHANNELS, 1.0, HAS_WEIGHT)  # [BLOCK_C]
        bias = _parameter(bias_ptr, first, c + channel, CHANNELS, 0.0, HAS_BIAS)
        for p in range(0, POSITIONS, BLOCK_P):
            centred, u = _upstream(dy_ptr, x_ptr, mean, scale, bias, c + channel, p + position,
                                   CHANNELS, POSITIONS, stride_c, stride_p, RELU)  # fmt: skip
            dx = u * scale[:, None] - level_mean - centred * slope_mean
            _store_tile(dx_ptr, dx, c + channel, p + position, CHANNELS, POSITIONS, stride_c, stride_p)


def _empty_maps(x: torch.Tensor) -> torch.Tensor:
    """New maps whose samples are in x's order and follow one another."""
    samples, channels, positions = x.shape
    if _channels_last(x):
        return torch.empty((samples, positions, channels), dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty((samples, channels, positions), dtype=x.dtype, device=x.device)


def _channels_last(x: torch.Tensor) -> bool:
    _, channels, positions = x.shape
    return (channels > 1 and x.stride(1) != positions) or (positions > 1 and x.stride(2) != 1)


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """Strides of a channel and a position; the kernels know it when one of them is 1."""
    return (1, x.shape[1]) if _channels_last(x) else (x.shape[2], 1)


def forward(x, num_groups, weight, bias, eps, relu):
    samples, channels, positions = x.shape
    y = _empty_maps(x)
    mean = torch.empty((samples, num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    tile = _tuning.maps(channels // num_groups, positions)
    with _device.on_device_of(x):
        _group_norm_fwd_kernel[(samples * num_groups,)](
            x, weight, bias, y, mean, rstd,
            num_groups, channels // num_groups, positions, x.stride(0), y.stride(0), *_steps(x), eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, RELU=relu, **vars(tile),
        )  # fmt: skip
    return y, mean, rstd


def backward(dy, x, mean, rstd, weight, bias, relu):
    samples, channels, positions = x.shape
    groups = mean.shape[1]
    dx = _empty_maps(x)
    dweight, dbias = (
        torch.empty(channels, dtype=x.dtype if parameter is None else parameter.dtype, device=x.device)
        for parameter in (weight, bias)
    )
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    partials = torch.empty((2, samples, channels), dtype=torch.float32, device=x.device)
    tile, lines = _tuning.maps(channels // groups, positions), _tuning.partial_rows(samples)
    with _device.on_device_of(x):
        _group_norm_bwd_kernel[(samples * groups,)](
            dy, x, mean, rstd, weight, bias, dx, partials,
            groups, channels // groups, positions, dy.stride(0), x.stride(0), dx.stride(0), *_steps(x),
            samples * channels,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, RELU=relu, **vars(tile),
        )  # fmt: skip
        _layer_norm_bwd_sum_kernel[(triton.cdiv(channels, lines.BLOCK_D), 2)](
            partials, dweight, dbias, None, samples, channels, HAS_LAYER_SCALE=False, **vars(lines)
        )
    return dx, dweight, dbias
