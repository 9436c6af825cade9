"""The matrix products behind linear and norm_mlp: forward, and the gradient of the input.

LayerNorm of the left side happens on the way in or in the epilogue, everything element-wise in the epilogue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _device, _tuning
from ._device import _activate, _activation_grad, _normalise, _numbered_tile
from ._matmul_weight import grad_scaled_weight, grad_weight, sum_partials

__all__ = ["grad_input", "grad_scaled_weight", "grad_weight", "linear", "sum_partials"]


@triton.jit
def _read(source, m, n, row, column, stride, inside, DESCRIPTORS: tl.constexpr):
    """Tile (m, n) of a matrix, by descriptor or by address, in fp32."""
    if DESCRIPTORS:
        tile = source.load([m, n])
    else:
        start = tl.full([], m, tl.int64) * stride + n
        tile = tl.load(source + start + (row * stride + column), mask=inside, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _write(target, tile, m, n, row, column, N, inside, DESCRIPTORS: tl.constexpr):
    """Tile (m, n) of a contiguous matrix, by descriptor or by address."""
    if DESCRIPTORS:
        target.store([m, n], tile.to(target.dtype))
    else:
        start = tl.full([], m, tl.int64) * N + n
        tl.store(target + start + (row * N + column), tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _finish_tile(
    total, m, n, vectors, matrices, M, N, SAMPLE_ROWS, stride_rm,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue: everything between tile (m, n) of a product [BLOCK_M, BLOCK_N] and memory."""
    bias_ptr, layer_scale_ptr, sample_scale_ptr, mean_ptr, rstd_ptr, colsum_ptr = vectors
    y, residual, preact, activated = matrices
    row = tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    column = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    row_inside = m + row < M
    column_inside = n + column < N
    inside = row_inside & column_inside
    at = row
    if WIDE:
        at = row.to(tl.int64)
    if colsum_ptr is not None:
        mean = tl.load(mean_ptr + m + row, mask=row_inside, other=0.0)  # [BLOCK_M, 1]
        rstd = tl.load(rstd_ptr + m + row, mask=row_inside, other=0.0)  # [BLOCK_M, 1]
        total = rstd * (total - mean * tl.load(colsum_ptr + n + column, mask=column_inside, other=0.0))
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n + column, mask=column_inside, other=0.0).to(tl.float32)
    if BACKWARD:
        if preact is not None:
            kept = _read(preact, m, n, at, column, N, inside, DESCRIPTORS)
            if activated is not None:
                _write(activated, _activate(kept, ACTIVATION), m, n, at, column, N, inside, DESCRIPTORS)
            total *= _activation_grad(kept, ACTIVATION)
    else:
        if preact is not None:
            _write(preact, total, m, n, at, column, N, inside, DESCRIPTORS)
        total = _activate(total, ACTIVATION)
    if layer_scale_ptr is not None:
        total *= tl.load(layer_scale_ptr + n + column, mask=column_inside, other=0.0).to(tl.float32)
    if sample_scale_ptr is not None:
        sample = (m + row) // SAMPLE_ROWS  # [BLOCK_M, 1]
        total *= tl.load(sample_scale_ptr + sample, mask=row_inside, other=0.0).to(tl.float32)
    if residual is not None:
        total += _read(residual, m, n, at, column, stride_rm, inside, DESCRIPTORS)
    _write(y, total, m, n, at, column, N, inside, DESCRIPTORS)


@triton.jit
def _halves(tile):
    """A tile's left and right half."""
    height: tl.constexpr = tile.shape[0]
    width: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (height, 2, width)), (0, 2, 1)))


@triton.jit
def _product_tile(
    tile, finished, x, weight, norm, vectors, matrices, M, N, K, first_k, end_k, SAMPLE_ROWS, stride_xm, stride_w,
    stride_rm, BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, HAS_NORM: tl.constexpr, EVEN_K: tl.constexpr,
    WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of x W over first_k to end_k, with its epilogue, which counts its tiles in `finished`."""
    tile_m, tile_n = _numbered_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    depth = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    if HAS_NORM:
        mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr = norm
        at = tile_m.to(tl.int64) * BLOCK_M + row
        mean = tl.load(mean_ptr + at, mask=at < M, other=0.0)[:, None]  # [BLOCK_M, 1]
        rstd = tl.load(rstd_ptr + at, mask=at < M, other=0.0)[:, None]  # [BLOCK_M, 1]
    if not DESCRIPTORS:
        m = tile_m.to(tl.int64) * BLOCK_M
        n = tile_n.to(tl.int64) * BLOCK_N
        x_row = row.to(tl.int64) if WIDE else row
        x_block = x + m * stride_xm + (x_row[:, None] * stride_xm + depth[None, :])  # [BLOCK_M, BLOCK_K]
        if BACKWARD:
            weight_row = depth.to(tl.int64) if WIDE else depth
            weight_block = weight + n + (weight_row[:, None] * stride_w + column[None, :])  # [BLOCK_K, BLOCK_N]
        else:
            weight_row = column.to(tl.int64) if WIDE else column
            weight_block = weight + n * stride_w + (weight_row[None, :] * stride_w + depth[:, None])
        row_inside = m + row < M
        column_inside = n + column < N

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first_k, end_k, BLOCK_K):
        if DESCRIPTORS:
            x_tile = x.load([tile_m * BLOCK_M, k])  # [BLOCK_M, BLOCK_K]
            if BACKWARD:
                weight_tile = weight.load([k, tile_n * BLOCK_N])  # [BLOCK_K, BLOCK_N]
            else:
                weight_tile = weight.load([tile_n * BLOCK_N, k]).T  # [BLOCK_K, BLOCK_N]
        else:
            x_mask = row_inside[:, None]
            weight_mask = column_inside[None, :]
            if not EVEN_K:
                x_mask = x_mask & (k + depth < K)[None, :]
                weight_mask = weight_mask & (k + depth < K)[:, None]
            step = tl.full([], k, tl.int64) * stride_w if BACKWARD else k
            x_tile = tl.load(x_block + k, mask=x_mask, other=0.0)
            weight_tile = tl.load(weight_block + step, mask=weight_mask, other=0.0)
        if HAS_NORM:
            # Columns beyond K need no care: they meet a zero of the weight.
            x_tile = _normalise(x_tile, mean, rstd, norm_weight_ptr, norm_bias_ptr, k + depth, k + depth < K)
        total = tl.dot(x_tile, weight_tile, total, input_precision="ieee")

    tile_m, tile_n = _numbered_tile(finished, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if PIECES == 1:
        pieces = (total,)
    elif PIECES == 2:
        pieces = _halves(total)
    else:
        left, right = _halves(total)
        pieces = _halves(left) + _halves(right)
    for piece in tl.static_range(PIECES):
        n = tile_n * BLOCK_N + piece * (BLOCK_N // PIECES)
        _finish_tile(pieces[piece], tile_m * BLOCK_M, n, vectors, matrices, M, N, SAMPLE_ROWS, stride_rm,
                     BACKWARD, ACTIVATION, WIDE, DESCRIPTORS, BLOCK_M, BLOCK_N // PIECES)  # fmt: skip


@triton.jit
def _product_kernel(
    x, weight, bias_ptr, layer_scale_ptr, sample_scale_ptr, mean_ptr, rstd_ptr, colsum_ptr,
    y, residual, preact, activated, norm_weight_ptr, norm_bias_ptr,
    M, N, K, SPLIT_K, SAMPLE_ROWS, stride_xm, stride_w, stride_rm,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, HAS_NORM: tl.constexpr, EVEN_K: tl.constexpr,
    WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = epilogue(x W), W read from weight (N, K), or (K, N) if BACKWARD; the second axis of programs splits K.

    With DESCRIPTORS x, weight, y, residual, preact and activated are tensor descriptors, else pointers.
    """
    first_k = tl.program_id(1) * SPLIT_K
    end_k = tl.minimum(K, first_k + SPLIT_K)
    norm = (mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr)
    vectors = (bias_ptr, layer_scale_ptr, sample_scale_ptr, mean_ptr, rstd_ptr, colsum_ptr)
    if DESCRIPTORS:
        matrices = (y, residual, preact, activated)
        # The epilogue counts its tiles itself: with the loop's counter it would keep the next tile's loads waiting.
        finished = tl.program_id(0) - tl.num_programs(0)
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            finished += tl.num_programs(0)
            _product_tile(tile, finished, x, weight, norm, vectors, matrices, M, N, K, first_k, end_k, SAMPLE_ROWS,
                          stride_xm, stride_w, stride_rm, BACKWARD, ACTIVATION, HAS_NORM, EVEN_K, WIDE, DESCRIPTORS,
                          PIECES, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        matrices = (y + tl.program_id(1).to(tl.int64) * M * N, residual, preact, activated)
        _product_tile(tl.program_id(0), tl.program_id(0), x, weight, norm, vectors, matrices, M, N, K, first_k, end_k,
                      SAMPLE_ROWS, stride_xm, stride_w, stride_rm, BACKWARD, ACTIVATION, HAS_NORM, EVEN_K, WIDE,
                      DESCRIPTORS, PIECES, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip


@triton.jit
def _product_epilogue_kernel(
    product_ptr, bias_ptr, layer_scale_ptr, sample_scale_ptr, mean_ptr, rstd_ptr, colsum_ptr,
    y, residual, preact, activated, M, N, SPLITS, SAMPLE_ROWS, stride_rm,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of a product that lies in memory, as SPLITS parts (SPLITS, M, N), added in their order."""
    m = tl.program_id(0) * BLOCK_M
    n = tl.program_id(1) * BLOCK_N
    row = m.to(tl.int64) + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = (row < M)[:, None] & (column < N)[None, :]
    block = product_ptr + row[:, None] * N + column[None, :]  # [BLOCK_M, BLOCK_N]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(SPLITS):
        total += tl.load(block + tl.full([], split, tl.int64) * M * N, mask=inside, other=0.0).to(tl.float32)
    vectors = (bias_ptr, layer_scale_ptr, sample_scale_ptr, mean_ptr, rstd_ptr, colsum_ptr)
    matrices = (y, residual, preact, activated)
    _finish_tile(total, m, n, vectors, matrices, M, N, SAMPLE_ROWS, stride_rm, BACKWARD, ACTIVATION, WIDE, False,
                 BLOCK_M, BLOCK_N)  # fmt: skip


class _Epilogue(NamedTuple):
    """What happens to a product on its way to memory; None where there is nothing to do."""

    activation: str = "none"
    backward: bool = False
    bias: torch.Tensor | None = None
    layer_scale: torch.Tensor | None = None
    sample_scale: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    preact: torch.Tensor | None = None
    activated: torch.Tensor | None = None
    fold: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def vectors(self):
        return self.bias, self.layer_scale, self.sample_scale, *(self.fold or (None, None, None))

    def matrices(self, y):
        return y, self.residual, self.preact, self.activated

    def readable(self):
        kept = {name: getattr(self, name) for name in ("residual", "preact")}
        return self._replace(**{name: t if t is None else _device.readable(t) for name, t in kept.items()})

    def sizes(self, row_count):
        sample_rows = 1 if self.sample_scale is None else row_count // self.sample_scale.shape[0]
        return sample_rows, 0 if self.residual is None else self.residual.stride(0)


def linear(
    x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale=None, norm=None, fold=None
):  # fmt: skip
    """linear.forward, and two ways to take LayerNorm of x on the fly.

    norm = (mean, rstd, norm_weight, norm_bias) normalises x as it is loaded. fold = (mean, rstd, colsum) does it to the
    product: the weight carries LayerNorm's weight already, colsum [N] (fp32) sums its rows, the bias carries W β.
    """
    preact = torch.empty((x.shape[0], weight.shape[0]) if keep_preact else 0, dtype=x.dtype, device=x.device)
    epilogue = _Epilogue(
        activation, False, bias, layer_scale, sample_scale, residual, preact if keep_preact else None, None, fold
    )
    return _product(x, weight, epilogue, norm), preact


def grad_input(d, weight, preact=None, activation="none", keep_activated=False):
    """d (M, N) @ weight (N, K), times activation'(preact) where preact (M, K) is given: (dx, activation(preact)).

    keep_activated asks for the second, in the same pass over preact, as the right side of grad_weight; or it is empty.
    """
    activated = torch.empty((d.shape[0], weight.shape[1]) if keep_activated else 0, dtype=d.dtype, device=d.device)
    preact = None if preact is None else preact.contiguous()
    epilogue = _Epilogue(activation, True, preact=preact, activated=activated if keep_activated else None)
    return _product(d, weight, epilogue), activated


def _product(x, weight, epilogue, norm=None):
    """epilogue(x Wᵀ), or epilogue(x W) if that is backward."""
    row_count, depth = x.shape
    width = weight.shape[1 if epilogue.backward else 0]
    sizes = row_count, width, depth
    if row_count * width == 0:
        return torch.empty((row_count, width), dtype=x.dtype, device=x.device)
    x, weight = _device.readable(x), _device.readable(weight)
    chip = _device.chip(x)
    if norm is None and _tuning.library("input" if epilogue.backward else "forward", chip, x.element_size(), *sizes):
        return _library_product(x, weight, epilogue)
    aligned = _device.aligned(x, depth, width, x.stride(0), weight.stride(0))
    tile, splits = _tuning.matmul(chip, x.element_size(), *sizes, aligned)
    if tile.DESCRIPTORS:
        epilogue = epilogue.readable()
    if splits == 1:
        y = torch.empty((row_count, width), dtype=x.dtype, device=x.device)
        _launch(x, weight, y, epilogue, norm, tile, 1)
        return y
    parts = torch.empty((splits, row_count, width), dtype=torch.float32, device=x.device)
    _launch(x, weight, parts, _Epilogue(backward=epilogue.backward), norm, tile, splits)
    return _finish(parts, epilogue, x.dtype)


def _launch(x, weight, y, epilogue, norm, tile, splits):
    """The product kernel alone, into y (M, N) or the parts (splits, M, N) of a sum."""
    (row_count, depth), width = x.shape, y.shape[-1]
    strides = x.stride(0), weight.stride(0)
    sample_rows, residual_stride = epilogue.sizes(row_count)
    *scales, mean, rstd, colsum = epilogue.vectors()
    norm_weight = norm_bias = None
    if norm is not None:
        mean, rstd, norm_weight, norm_bias = norm
    tiles = triton.cdiv(row_count, tile.BLOCK_M) * triton.cdiv(width, tile.BLOCK_N)
    programs, matrices = tiles, (x, weight, *epilogue.matrices(y))
    if tile.DESCRIPTORS:
        programs = min(tiles, _device.processors(x))
        weight_block = (tile.BLOCK_K, tile.BLOCK_N) if epilogue.backward else (tile.BLOCK_N, tile.BLOCK_K)
        blocks = (tile.BLOCK_M, tile.BLOCK_K), weight_block, *4 * [(tile.BLOCK_M, tile.BLOCK_N // tile.PIECES)]
        matrices = map(_descriptor, matrices, blocks)
    x_matrix, weight_matrix, *outer = matrices
    with _device.on_device_of(x):
        _product_kernel[(programs, splits)](
            x_matrix, weight_matrix, *scales, mean, rstd, colsum, *outer, norm_weight, norm_bias,
            row_count, width, depth, triton.cdiv(depth, splits * tile.BLOCK_K) * tile.BLOCK_K, sample_rows,
            *strides, residual_stride, BACKWARD=epilogue.backward, ACTIVATION=epilogue.activation,
            HAS_NORM=norm is not None, EVEN_K=depth % tile.BLOCK_K == 0,
            WIDE=_device.wide((*strides, residual_stride, width)), **vars(tile),
        )  # fmt: skip


def _descriptor(tensor, block):
    return None if tensor is None else TensorDescriptor.from_tensor(tensor, list(block))


def _library_product(x, weight, epilogue):
    right = weight if epilogue.backward else weight.t()
    if epilogue == _Epilogue(backward=epilogue.backward):
        return torch.mm(x, right)
    if epilogue == _Epilogue(bias=epilogue.bias):
        return torch.addmm(epilogue.bias, x, right)
    return _finish(torch.mm(x, right)[None], epilogue, x.dtype)


def _finish(parts, epilogue, dtype):
    """The epilogue of a product that lies in memory as parts (splits, M, N)."""
    splits, row_count, width = parts.shape
    y = torch.empty((row_count, width), dtype=dtype, device=parts.device)
    tile = _tuning.EPILOGUE
    sample_rows, residual_stride = epilogue.sizes(row_count)
    with _device.on_device_of(y):
        _product_epilogue_kernel[(triton.cdiv(row_count, tile.BLOCK_M), triton.cdiv(width, tile.BLOCK_N))](
            parts, *epilogue.vectors(), *epilogue.matrices(y), row_count, width, splits, sample_rows, residual_stride,
            BACKWARD=epilogue.backward, ACTIVATION=epilogue.activation,
            WIDE=_device.wide((residual_stride, width)), **vars(tile),
        )  # fmt: skip
    return y
