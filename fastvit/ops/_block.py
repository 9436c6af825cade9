"""How an encoder trains: z' = z + γ₁ MSA(LN(z)), z'' = z' + γ₂ MLP(LN(z')), a block and its gradients as one op.

Equations 2 and 3 of "An Image is Worth 16x16 Words" (arXiv 2010.11929). One op instead of six keeps the sums of the
residual stream and of its gradient inside the kernels, which under autocast read the float32 weights themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from . import _contract as contract

# The gradients' order: x, then the parameters of ``fastvit.ops.EncoderBlock``.
INPUTS = 15


def _forward(
    x: Tensor,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale1: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale2: Tensor | None,
    eps: Sequence[float],
    num_heads: int,
    scale: float,
    activation: str,
    compute: str,
    backend: str,
) -> list[Tensor]:
    attention = (norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale1)
    mlp = (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale2)
    launch = backends.implementation("encoder", backend).block.forward
    return launch(x, *attention, *mlp, eps, num_heads, scale, activation, compute)


def _fake(x, *args):
    *parameters, _, num_heads, _, _, compute, _ = args
    batch, tokens, width = x.shape
    hidden, rows = parameters[9].shape[0], batch * tokens
    low, wide = getattr(torch, compute), torch.float32
    shapes = [(width, low), (3 * width, low), (width, low), (width, wide), (width, low), (hidden, low)]
    n1, qkv, heads, mid, n2, preact = (x.new_empty(rows, columns, dtype=dtype) for columns, dtype in shapes)
    lse = x.new_empty(batch, num_heads, tokens, dtype=wide)
    statistics = [x.new_empty(rows, dtype=wide) for _ in range(4)]
    return [x.new_empty(x.shape), n1, qkv, heads, lse, mid, n2, preact, *statistics]


def _backward(
    dy: Tensor,
    wanted: Sequence[bool],
    x: Tensor,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale1: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale2: Tensor | None,
    kept: Sequence[Tensor],
    num_heads: int,
    scale: float,
    activation: str,
    backend: str,
) -> list[Tensor]:
    attention = (norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale1)
    mlp = (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale2)
    launch = backends.implementation("encoder", backend).block.backward
    grads = launch(dy.contiguous(), wanted, x, *attention, *mlp, kept, num_heads, scale, activation)
    return [contract.absent(dy) if g is None else g for g in grads]


def _backward_fake(dy, wanted, *args):
    return [torch.empty_like(t) if need else dy.new_empty(0) for t, need in zip(args[:INPUTS], wanted, strict=True)]


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    _, ctx.num_heads, ctx.scale, ctx.activation, _, ctx.backend = inputs[INPUTS:]
    ctx.save_for_backward(*inputs[:INPUTS], *output[1:])


def _autograd(ctx, grads):
    saved, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[:INPUTS])
    inputs, kept = saved[:INPUTS], list(saved[INPUTS:])
    found = _backward_op(grads[0], wanted, *inputs, kept, ctx.num_heads, ctx.scale, ctx.activation, ctx.backend)
    return *(g if need else None for g, need in zip(found, wanted, strict=True)), *[None] * 6


_op, _backward_op = contract.register("block", _forward, _fake, _backward, _backward_fake, _setup_context, _autograd)


def run_block(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    eps: Sequence[float],
    num_heads: int,
    scale: float,
    activation: str,
    compute: str,
) -> Tensor | None:
    """A block by the encoder's backend, gradients included, or None where that has no such kernel.

    For callers whose arguments need no checks: x (B, N, D) and the tensors of an ``EncoderBlock``, its two eps, what
    products are computed in.
    """
    args = (x, *parameters, eps, num_heads, scale, activation, compute)
    backend = backends.serving("encoder", x, parameters, eps, num_heads, scale, activation, compute, [])
    if backend is None or backend == "reference":
        return None
    block = getattr(backends.implementation("encoder", backend), "block", None)
    return None if block is None or block.why_not(*args) is not None else _op(*args, backend)[0]
