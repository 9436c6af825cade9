"""LayerNorm's backward in one pass over memory: every gradient of y = LN(z), z = residual + scales * x.

A fixed number of programs walks the rows, each in its own fixed order, with its sums for the parameters in registers;
a second kernel adds those partial sums. Which program ran when changes nothing: no atomics, no locks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning


@triton.jit
def _tile(base_ptr, first, row, column, M, D, stride):
    """Rows first + [BLOCK_M] by columns [BLOCK_D] in fp32, 0 beyond the last."""
    inside = (first + row < M)[:, None] & (column < D)[None, :]
    block = base_ptr + first * stride + (row[:, None] * stride + column[None, :])
    return tl.load(block, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(base_ptr, tile, first, row, column, M, D):
    inside = (first + row < M)[:, None] & (column < D)[None, :]
    block = base_ptr + first * D + (row[:, None] * D + column[None, :])
    tl.store(block, tile.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _parameter(vector_ptr, column, D, PRESENT: tl.constexpr):
    """One parameter [1, BLOCK_D] in fp32; an absent one is 1."""
    if PRESENT:
        return tl.load(vector_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return tl.full([1, column.shape[0]], 1.0, tl.float32)


@triton.jit
def _row_numbers(mean_ptr, rstd_ptr, sample_scale_ptr, row, M, SAMPLE_ROWS, HAS_SAMPLE_SCALE: tl.constexpr):
    """What belongs to whole rows: mean, rstd and the sample's factor, each [BLOCK_M, 1]; 0 beyond the last row."""
    mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
    sample_scale = tl.full([row.shape[0], 1], 1.0, tl.float32)
    if HAS_SAMPLE_SCALE:
        sample_scale = tl.load(sample_scale_ptr + row // SAMPLE_ROWS, mask=row < M, other=0.0).to(tl.float32)[:, None]
    return mean, rstd, sample_scale


@triton.jit
def _fold(tile, SUMS: tl.constexpr):
    """A tile [BLOCK_M, BLOCK_D] summed to [SUMS, BLOCK_D]: with as many sums as a thread has rows apart, no thread
    waits for another."""
    return tl.sum(tl.reshape(tile, [tile.shape[0] // SUMS, SUMS, tile.shape[1]]), axis=0)


@triton.jit
def _store_partials(partials_ptr, column, program, programs, D, dweight, dbias, dlayer_scale,
                    HAS_LAYER_SCALE: tl.constexpr):  # fmt: skip
    """This program's line of each parameter's table (parameters, programs, D)."""
    line = partials_ptr + program.to(tl.int64) * D + column  # [BLOCK_D]
    table = programs.to(tl.int64) * D
    tl.store(line, tl.sum(dweight, axis=0), mask=column < D)
    tl.store(line + table, tl.sum(dbias, axis=0), mask=column < D)
    if HAS_LAYER_SCALE:
        tl.store(line + 2 * table, tl.sum(dlayer_scale, axis=0), mask=column < D)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dz_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr, x_ptr, layer_scale_ptr, sample_scale_ptr,
    d_ptr, dx_ptr, partials_ptr,
    M, D, SAMPLE_ROWS, stride_dym, stride_dzm, stride_zm, stride_xm,
    HAS_DZ: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_SAMPLE_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row = tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    weight = _parameter(weight_ptr, column, D, HAS_WEIGHT)
    layer_scale = _parameter(layer_scale_ptr, column, D, HAS_LAYER_SCALE)
    dweight = tl.zeros([SUMS, BLOCK_D], tl.float32)
    dbias = tl.zeros([SUMS, BLOCK_D], tl.float32)
    dlayer_scale = tl.zeros([SUMS, BLOCK_D], tl.float32)
    inverse_width = 1.0 / D
    for tile in tl.range(program, tl.cdiv(M, BLOCK_M), programs, num_stages=STAGES):
        first = tl.cast(tile, tl.int64) * BLOCK_M
        mean, rstd, sample_scale = _row_numbers(mean_ptr, rstd_ptr, sample_scale_ptr, first + row, M, SAMPLE_ROWS,
                                                HAS_SAMPLE_SCALE)  # fmt: skip
        dy = _tile(dy_ptr, first, row, column, M, D, stride_dym)  # [BLOCK_M, BLOCK_D]
        normalised = (_tile(z_ptr, first, row, column, M, D, stride_zm) - mean) * rstd
        g = dy * weight
        g_mean, along_mean = tl.split(tl.sum(tl.join(g, g * normalised), axis=1) * inverse_width)  # [BLOCK_M]
        d = g * rstd - (normalised * (along_mean[:, None] * rstd) + g_mean[:, None] * rstd)
        if HAS_DZ:
            d += _tile(dz_ptr, first, row, column, M, D, stride_dzm)
        _store_tile(d_ptr, d, first, row, column, M, D)
        dweight += _fold(dy * normalised, SUMS)
        dbias += _fold(dy, SUMS)
        branch = d * sample_scale
        if HAS_LAYER_SCALE:
            dlayer_scale += _fold(branch * _tile(x_ptr, first, row, column, M, D, stride_xm), SUMS)
        if HAS_LAYER_SCALE or HAS_SAMPLE_SCALE:
            _store_tile(dx_ptr, branch * layer_scale, first, row, column, M, D)
    _store_partials(partials_ptr, column, program, programs, D, dweight, dbias, dlayer_scale, HAS_LAYER_SCALE)


@triton.jit
def _layer_norm_bwd_wide_kernel(
    dy_ptr, dz_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr, layer_scale_ptr, sample_scale_ptr, d_ptr, dx_ptr,
    M, D, SAMPLE_ROWS, stride_dym, stride_dzm, stride_zm,
    HAS_DZ: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_LAYER_SCALE: tl.constexpr, HAS_SAMPLE_SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows' gradients where a row is walked in pieces: once for its two means, once for the result."""
    first = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 1).to(tl.int64)  # [1]
    mean, rstd, sample_scale = _row_numbers(mean_ptr, rstd_ptr, sample_scale_ptr, first + row, M, SAMPLE_ROWS,
                                            HAS_SAMPLE_SCALE)  # fmt: skip
    total = tl.zeros([1, BLOCK_D], tl.float32)
    along = tl.zeros([1, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        g = _tile(dy_ptr, first, row, column, M, D, stride_dym) * _parameter(weight_ptr, column, D, HAS_WEIGHT)
        total += g
        along += g * ((_tile(z_ptr, first, row, column, M, D, stride_zm) - mean) * rstd)
    g_mean = tl.sum(total, axis=1, keep_dims=True) / D  # [1, 1]
    along_mean = tl.sum(along, axis=1, keep_dims=True) / D  # [1, 1]
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        g = _tile(dy_ptr, first, row, column, M, D, stride_dym) * _parameter(weight_ptr, column, D, HAS_WEIGHT)
        normalised = (_tile(z_ptr, first, row, column, M, D, stride_zm) - mean) * rstd
        d = rstd * (g - g_mean - normalised * along_mean)
        if HAS_DZ:
            d += _tile(dz_ptr, first, row, column, M, D, stride_dzm)
        _store_tile(d_ptr, d, first, row, column, M, D)
        if HAS_LAYER_SCALE or HAS_SAMPLE_SCALE:
            dx = d * sample_scale * _parameter(layer_scale_ptr, column, D, HAS_LAYER_SCALE)
            _store_tile(dx_ptr, dx, first, row, column, M, D)


@triton.jit
def _layer_norm_bwd_columns_kernel(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, x_ptr, d_ptr, sample_scale_ptr, partials_ptr,
    M, D, SAMPLE_ROWS, stride_dym, stride_zm, stride_xm,
    HAS_LAYER_SCALE: tl.constexpr, HAS_SAMPLE_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parameters' partial sums after the wide kernel: each program walks down a band of columns."""
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    row = tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dlayer_scale = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(program, tl.cdiv(M, BLOCK_M), programs):
        first = tl.cast(tile, tl.int64) * BLOCK_M
        mean, rstd, sample_scale = _row_numbers(mean_ptr, rstd_ptr, sample_scale_ptr, first + row, M, SAMPLE_ROWS,
                                                HAS_SAMPLE_SCALE)  # fmt: skip
        dy = _tile(dy_ptr, first, row, column, M, D, stride_dym)  # [BLOCK_M, BLOCK_D]
        dweight += dy * ((_tile(z_ptr, first, row, column, M, D, stride_zm) - mean) * rstd)
        dbias += dy
        if HAS_LAYER_SCALE:
            branch = _tile(d_ptr, first, row, column, M, D, D) * sample_scale
            dlayer_scale += branch * _tile(x_ptr, first, row, column, M, D, stride_xm)
    _store_partials(partials_ptr, column, program, programs, D, dweight, dbias, dlayer_scale, HAS_LAYER_SCALE)


@triton.jit
def _layer_norm_bwd_sum_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, dlayer_scale_ptr, PROGRAMS, D,
    HAS_LAYER_SCALE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    parameter = tl.program_id(1)
    table_ptr = partials_ptr + parameter.to(tl.int64) * PROGRAMS * D
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, PROGRAMS, BLOCK_P):
        lines = start + tl.arange(0, BLOCK_P)[:, None]  # [BLOCK_P, 1]
        inside = (lines < PROGRAMS) & (column < D)[None, :]
        total += tl.load(table_ptr + lines.to(tl.int64) * D + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, axis=0).to(dweight_ptr.dtype.element_ty)  # [BLOCK_D]
    if parameter == 0:
        tl.store(dweight_ptr + column, result, mask=column < D)
    elif parameter == 1:
        tl.store(dbias_ptr + column, result, mask=column < D)
    elif HAS_LAYER_SCALE:
        tl.store(dlayer_scale_ptr + column, result, mask=column < D)


def backward(dy, dz, z, mean, rstd, weight, x, layer_scale, sample_scale):
    """(dresidual, dx, dlayer_scale, dweight, dbias); dx is absent where nothing scales x, dlayer_scale without one."""
    rows, width = z.shape
    scaled = layer_scale is not None or sample_scale is not None
    d = torch.empty((rows, width), dtype=z.dtype, device=z.device)
    dx = torch.empty_like(d) if scaled else z.new_empty(0)
    if d.numel() == 0:
        dlayer_scale = z.new_empty(0) if layer_scale is None else z.new_zeros(width)
        return d, dx, dlayer_scale, z.new_zeros(width), z.new_zeros(width)
    dweight = torch.empty(width, dtype=z.dtype, device=z.device)
    dbias = torch.empty_like(dweight)
    dlayer_scale = z.new_empty(0) if layer_scale is None else torch.empty_like(dweight)
    walk = _walk_rows if width <= _tuning.NORM_BACKWARD_ELEMENTS else _walk_pieces
    with _device.on_device_of(z):
        partials = walk(dy, dz, z, mean, rstd, weight, x, layer_scale, sample_scale, d, dx)
        tile = _tuning.partial_rows(partials.shape[1])
        _layer_norm_bwd_sum_kernel[(triton.cdiv(width, tile.BLOCK_D), partials.shape[0])](
            partials, dweight, dbias, dlayer_scale, partials.shape[1], width,
            HAS_LAYER_SCALE=layer_scale is not None, **vars(tile),
        )  # fmt: skip
    return d, dx, dlayer_scale, dweight, dbias


def _partials(z, layer_scale, programs):
    shape = (2 if layer_scale is None else 3, programs, z.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=z.device)


def _walk_rows(dy, dz, z, mean, rstd, weight, x, layer_scale, sample_scale, d, dx):
    rows, width = z.shape
    scaled = layer_scale is not None or sample_scale is not None
    tile, programs = _tuning.norm_backward(z.element_size(), width, scaled)
    programs = min(triton.cdiv(rows, tile.BLOCK_M), programs * _device.processors(z))
    partials = _partials(z, layer_scale, programs)
    _layer_norm_bwd_kernel[(programs,)](
        dy, dz, z, mean, rstd, weight, x, layer_scale, sample_scale, d, dx, partials,
        rows, width, 1 if sample_scale is None else rows // sample_scale.shape[0],
        dy.stride(0), 0 if dz is None else dz.stride(0), z.stride(0), 0 if x is None else x.stride(0),
        HAS_DZ=dz is not None, HAS_WEIGHT=weight is not None, HAS_LAYER_SCALE=layer_scale is not None,
        HAS_SAMPLE_SCALE=sample_scale is not None, **vars(tile),
    )  # fmt: skip
    return partials


def _walk_pieces(dy, dz, z, mean, rstd, weight, x, layer_scale, sample_scale, d, dx):
    rows, width = z.shape
    sample_rows = 1 if sample_scale is None else rows // sample_scale.shape[0]
    scales = {"HAS_LAYER_SCALE": layer_scale is not None, "HAS_SAMPLE_SCALE": sample_scale is not None}
    _layer_norm_bwd_wide_kernel[(rows,)](
        dy, dz, z, mean, rstd, weight, layer_scale, sample_scale, d, dx,
        rows, width, sample_rows, dy.stride(0), 0 if dz is None else dz.stride(0), z.stride(0),
        HAS_DZ=dz is not None, HAS_WEIGHT=weight is not None, **scales, **vars(_tuning.NORM_BACKWARD_PIECE),
    )  # fmt: skip
    tile = _tuning.NORM_BACKWARD_BAND
    bands = triton.cdiv(width, tile.BLOCK_D)
    programs = min(triton.cdiv(rows, tile.BLOCK_M), triton.cdiv(4 * _device.processors(z), bands))
    partials = _partials(z, layer_scale, programs)
    _layer_norm_bwd_columns_kernel[(bands, programs)](
        dy, z, mean, rstd, x, d, sample_scale, partials,
        rows, width, sample_rows, dy.stride(0), z.stride(0), 0 if x is None else x.stride(0), **scales, **vars(tile),
    )  # fmt: skip
    return partials
