"""A Vision Transformer's encoder: pre-norm blocks one after the other in a single call.

Equations 2 and 3 of "An Image is Worth 16x16 Words" (arXiv 2010.11929): z' = z + MSA(LN(z)), z'' = z' + MLP(LN(z')).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from . import _contract as contract
from ._block import run_block
from .attention import attention_packed
from .layer_norm import layer_norm
from .linear import linear
from .norm_mlp import norm_mlp


class EncoderBlock(NamedTuple):
    """The parameters of one block, as timm's modules hold them.

    qkv_weight (3·D, D), proj_weight (D, D), fc1_weight (F, D), fc2_weight (D, F), as in torch.nn.Linear, with their
    biases or None; the norms' weights and biases (D,) or None; the LayerScales (D,) or None (arXiv 2103.17239).
    """

    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    layer_scale1: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    layer_scale2: Tensor | None
    norm1_eps: float = 1e-6
    norm2_eps: float = 1e-6


TENSORS = len(EncoderBlock._fields) - 2


def _forward(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    num_heads: int,
    scale: float,
    activation: str,
    compute: str,
    int8: Sequence[bool],
    backend: str,
) -> Tensor:
    launch = backends.implementation("encoder", backend).forward
    return launch(x, parameters, eps, num_heads, scale, activation, compute, int8)


def _fake(x, parameters, eps, num_heads, scale, activation, compute, int8, backend):
    return x.new_empty(x.shape)


_op, _ = contract.register("encoder", _forward, _fake)


def prepare_encoder(x, blocks, num_heads, *, scale=None, activation="gelu"):
    """Check the public arguments and turn them into the launchers'."""
    op = "encoder"
    contract.check_tensor(op, "x", x, 3)
    activation, width = contract.check_activation(op, activation), x.shape[-1]
    if not isinstance(num_heads, int) or num_heads <= 0 or width % num_heads:
        raise ValueError(f"fastvit.{op}: num_heads must divide x's width {width}, got {num_heads!r}")
    parameters: list[Tensor | None] = []
    eps: list[float] = []
    for i, block in enumerate(blocks):
        contract.check_tensor(op, f"blocks[{i}].fc1_weight", block.fc1_weight, 2)
        hidden = block.fc1_weight.shape[0]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(EncoderBlock._fields[:TENSORS], (width,))
        shapes |= {"qkv_weight": (3 * width, width), "qkv_bias": (3 * width,), "proj_weight": (width, width)}
        shapes |= {"fc1_weight": (hidden, width), "fc1_bias": (hidden,), "fc2_weight": (width, hidden)}
        for name, shape in shapes.items():
            tensor = getattr(block, name)
            if tensor is None and name in ("qkv_weight", "proj_weight", "fc2_weight"):
                raise TypeError(f"fastvit.{op}: blocks[{i}].{name} must be a Tensor, got None")
            contract.check_like(op, f"blocks[{i}].{name}", tensor, "x", x, shape)
            parameters.append(contract.unit_stride(tensor))
        eps += (contract.check_eps(op, block.norm1_eps), contract.check_eps(op, block.norm2_eps))
    scale = (width // num_heads) ** -0.5 if scale is None else float(scale)
    return x, parameters, eps, num_heads, scale, activation, _compute(x), []


def _compute(x: Tensor) -> str:
    """The dtype of the matrix products, autocast's where it is on."""
    low = contract.autocast_dtype(x)
    return str(x.dtype if low is None else low).removeprefix("torch.")


def encoder(
    x: Tensor,
    blocks: Sequence[EncoderBlock],
    num_heads: int,
    *,
    scale: float | None = None,
    activation: str | None = "gelu",
) -> Tensor:
    """Encoder blocks in one call, z' = z + γ₁ MSA(LN(z)), z'' = z' + γ₂ MLP(LN(z')) for each.

    On a CPU, and when no gradient is asked for, one kernel runs all of them: weights packed once and kept, activations
    in the cache, the sums over blocks in float32 whatever x's dtype. In training there, a block of float32 weights is
    one op with a backward of its own, autocast or not. Elsewhere the blocks' ops run one by one.

    Args:
        x: (B, N, D) tokens, any strides, fp32 / fp16 / bf16 (fp64 one by one).
        blocks: each block's parameters, of x's dtype and device.
        num_heads: H; D must be a multiple of it.
        scale: factor of the scores, 1/√E by default.
        activation: "gelu" (error function), "gelu_tanh", "quick_gelu" or None.

    Returns:
        (B, N, D), contiguous. Under autocast to bfloat16 products are computed in it.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit, a negative eps, or an unknown activation.
    """
    args = prepare_encoder(x, blocks, num_heads, scale=scale, activation=activation)
    y = run_encoder(*args[:-2])
    if y is not None:
        return y
    for block in blocks:
        x = _one_by_one(x, block, num_heads, args[4], activation)
    return x


def run_encoder(x, parameters, eps, num_heads, scale, activation, int8=()) -> Tensor | None:
    """The blocks by one kernel, with gradients by one for each block, or None where no backend in force has them.

    For callers whose arguments need no checks; otherwise :func:`encoder`'s, as :func:`prepare_encoder` leaves them.

    Args:
        int8: empty, or for each block whether qkv, proj, fc1 and fc2 are int8; the other products then are bfloat16.
    """
    args = (x, parameters, eps, num_heads, scale, activation, "bfloat16" if int8 else _compute(x), int8)
    if contract.needs_grad(x, *parameters):
        return _train(*args)
    backend = backends.serving("encoder", *args)
    if backend in (None, "reference"):
        return None
    if torch.compiler.is_compiling():  # which does not know what a released weight is
        parameters = [getattr(p, "packed", p) for p in parameters]
        return _op(x, parameters, *args[2:], backend)
    return _forward(*args, backend)  # what the dispatcher does with hundreds of tensors takes longer than many a block


def _train(x, parameters, eps, num_heads, scale, activation, compute, int8) -> Tensor | None:
    for i in range(len(eps) // 2):
        block, its_eps = parameters[TENSORS * i : TENSORS * (i + 1)], eps[2 * i : 2 * i + 2]
        y = None if int8 else run_block(x, block, its_eps, num_heads, scale, activation, compute)
        if y is None and i == 0:
            return None
        x = _one_by_one(x, EncoderBlock(*block, *its_eps), num_heads, scale, activation) if y is None else y
    return x


def _one_by_one(x: Tensor, block: EncoderBlock, num_heads: int, scale: float, activation: str | None) -> Tensor:
    b = block
    qkv = linear(layer_norm(x, b.norm1_weight, b.norm1_bias, b.norm1_eps), b.qkv_weight, b.qkv_bias)
    heads = attention_packed(qkv, num_heads, scale=scale)
    x = linear(heads, b.proj_weight, b.proj_bias, layer_scale=b.layer_scale1, residual=x)
    mlp = (b.norm2_weight, b.norm2_bias, b.fc1_weight, b.fc1_bias, b.fc2_weight, b.fc2_bias)
    return norm_mlp(x, *mlp, b.norm2_eps, activation=activation, layer_scale=b.layer_scale2)
