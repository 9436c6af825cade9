"""What the kernels share: device functions, and the host's questions to Triton about this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Triton decides when a kernel is defined, not when it is launched, so the answer is taken once, beside the definitions.
INTERPRETING = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False
OLDEST_TRITON = (3, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def why_unavailable(device_type: str) -> str | None:
    """One sentence saying why Triton cannot run tensors of this device type here, or None if it can."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton: needs Triton 3.4 or newer, found {triton.__version__}"
    if INTERPRETING and device_type in ("cpu", "cuda"):
        return None
    if device_type == "cpu":
        return "triton: CPU tensors run only interpreted (set TRITON_INTERPRET=1 before the kernels are imported)"
    if device_type != "cuda":
        return f"triton: runs on cuda tensors, got {device_type}"
    if not torch.cuda.is_available():
        return "triton: torch finds no usable GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "triton: needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def why_not(x: torch.Tensor) -> str | None:
    """Why no kernel takes this tensor; metadata only."""
    if x.dtype not in DTYPES:
        return f"triton: takes float32, float16 and bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    if x.device.type == "cuda" or (x.device.type == "cpu" and INTERPRETING):
        return None
    return why_unavailable(x.device.type)


def chip(x: torch.Tensor) -> str:
    """Key of the tuning tables: "sm_90" for data-centre chips from Hopper on, "sm_80" for other NVIDIA chips, "hip"."""
    if torch.version.hip is not None:
        return "hip"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return "sm_80"
    return "sm_90"


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of this GPU; without one, few, so that a program of a fixed grid meets several tiles."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 2


def wide(strides: Sequence[int]) -> bool:
    """Whether offsets within a tile of up to 256 rows can pass 2^31, so that 32 bits do not hold them."""
    return max(strides) >= 1 << 23


def aligned(x: torch.Tensor, *lengths: int) -> bool:
    """Whether rows of these lengths and strides are read 16 bytes at a time; if not, each element costs an address."""
    return all(length * x.element_size() % 16 == 0 for length in lengths)


def readable(x: torch.Tensor) -> torch.Tensor:
    """The rows of x (M, D), copied if only a stride or an offset keeps them from being read 16 bytes at a time.

    A row of 16-bit numbers read one by one costs more than the copy, and results do not depend on where a tensor lies.
    """
    apart = x.stride(0) >= x.shape[1] and aligned(x, x.stride(0)) and x.data_ptr() % 16 == 0
    if apart or x.element_size() != 2 or not aligned(x, x.shape[1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _normal_cdf(x):
    """The normal distribution's Φ(x) and exp(-x²/2), fp32. 1 + erf would cancel in the left tail.

    Φ(-t) exp(t²/2) is smooth: a polynomial in 1 / (1 + 0.37 t), fitted to the least relative error (2e-7), gives it for
    every t >= 0.
    """
    bell = tl.exp(-0.5 * x * x)
    q = 1.0 / (1.0 + 0.37 * tl.abs(x))
    tail = 0.13513301312923431 + q * -0.031327106058597565
    tail = 0.06451559066772461 + q * (-0.19429895281791687 + q * tail)
    tail = 0.0901830643415451 + q * (0.01340671256184578 + q * tail)
    tail = 0.14761532843112946 + q * (0.1271638125181198 + q * tail)
    tail = bell * q * (0.14760860800743103 + q * tail)
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _sigmoid_and_slope(x):
    """σ(x) and its derivative σ(x) σ(-x), in which 1 - σ(x) would cancel for a large x."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    return tl.where(x < 0.0, small * large, large), small * large * large


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Activation of an fp32 block. tanh is written as a sigmoid: its relative error stays small in the left tail."""
    if ACTIVATION == "gelu":
        cdf, _ = _normal_cdf(x)
        x = x * cdf
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def _activation_grad(x, ACTIVATION: tl.constexpr):
    """Derivative of the activation at an fp32 block."""
    if ACTIVATION == "gelu":
        cdf, bell = _normal_cdf(x)
        grad = cdf + x * (0.3989422804014327 * bell)
    elif ACTIVATION == "gelu_tanh":
        gate, slope = _sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        grad = gate + x * slope * (1.5957691216057308 + 0.21406444881780076 * x * x)
    elif ACTIVATION == "quick_gelu":
        gate, slope = _sigmoid_and_slope(1.702 * x)
        grad = gate + 1.702 * x * slope
    else:
        grad = tl.full(x.shape, 1.0, tl.float32)
    return grad


@triton.jit
def _row_statistics(x, columns, D, eps):
    """Mean and 1/sqrt(variance + eps) of the rows of x [BLOCK_M, BLOCK_D]: fp32, whole rows, zero beyond D."""
    mean = tl.sum(x, axis=1) / D  # [BLOCK_M]
    centred = tl.where(columns < D, x - mean[:, None], 0.0)  # [BLOCK_M, BLOCK_D]
    return _refined_statistics(mean, tl.sum(centred, axis=1), tl.sum(centred * centred, axis=1), D, eps)


@triton.jit
def _refined_statistics(mean, centred_sum, squares, D, eps):
    """What the sum of the centred values says the mean missed; matters for rows far from 0."""
    missed = centred_sum / D  # [BLOCK_M]
    variance = tl.maximum(squares / D - missed * missed, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean + missed, tl.rsqrt(variance + eps)


@triton.jit
def _power_of(scale):
    """A power of two about as large as the root of an fp32 scale, so that it and its quotient share the exponent, and
    neither needs more range than fp16 has; 1 where the scale is 0."""
    exponent = ((scale.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    power = (((exponent >> 1) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(scale == 0.0, 1.0, power)


@triton.jit
def _normalise(x, mean, rstd, weight_ptr, bias_ptr, column, column_inside):
    """LayerNorm of a tile x [rows, columns], whose statistics are [rows, 1]."""
    h = (x.to(tl.float32) - mean) * rstd
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        h += tl.load(bias_ptr + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    return h.to(x.dtype)


@triton.jit
def _grouped_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile of this program."""
    return _numbered_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)


@triton.jit
def _numbered_tile(number, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile; neighbours in number share GROUP_M row tiles and reuse each other's cache lines."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = number // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows_in_group = min(tiles_m - first_m, GROUP_M)
    within = number % (GROUP_M * tiles_n)
    return first_m + within % rows_in_group, within // rows_in_group
