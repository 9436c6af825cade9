"""The MLP half of an encoder block: y = x + sample_scale * layer_scale * (activation(LayerNorm(x) W₁ᵀ + b₁) W₂ᵀ + b₂).

Equation 3 of "An Image is Worth 16x16 Words" (arXiv 2010.11929).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _contract as contract
from .layer_norm import layer_norm, reference_backward as layer_norm_backward
from .linear import activate, activation_backward, column_sum, linear, reference_backward as linear_backward


def reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    eps: float,
    activation: str,
    residual: bool,
    keep: bool = False,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; ``keep`` belongs to the launchers and means nothing here."""
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    hidden = activate(F.linear(normalised, fc1_weight, fc1_bias), activation)
    y = F.linear(hidden, fc2_weight, fc2_bias)
    y = y if layer_scale is None else y * layer_scale
    y = y if sample_scale is None else y * contract.per_row(sample_scale, y.shape[0])
    return x + y if residual else y


def reference_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    preact: Tensor,
    activation: str,
    residual: bool,
    sample_scale: Tensor | None = None,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    column_sum: Callable[[Tensor], Tensor] = column_sum,
    activation_backward: Callable[[Tensor, Tensor, str], Tensor] = activation_backward,
    norm_backward: Callable[..., Any] = layer_norm_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dnorm_weight, dnorm_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dlayer_scale).

    Keeps only the statistics and the pre-activation: normalised rows and hidden activations are computed again.
    """
    wide = mean.dtype
    normalised = (x.to(wide) - mean[:, None]) * rstd[:, None]
    normalised = normalised if norm_weight is None else normalised * norm_weight.to(wide)
    normalised = (normalised if norm_bias is None else normalised + norm_bias.to(wide)).to(x.dtype)
    hidden = activate(preact, activation)
    branch = dy if sample_scale is None else dy * contract.per_row(sample_scale, dy.shape[0])
    parts: dict[str, Any] = {
        "product": product,
        "column_sum": column_sum,
        "activation_backward": activation_backward,
    }
    dhidden, dfc2, dfc2_bias, dscale = linear_backward(
        branch, hidden, fc2_weight, fc2_bias, layer_scale, preact, "none", **parts
    )
    dnormalised, dfc1, dfc1_bias, _ = linear_backward(
        dhidden, normalised, fc1_weight, None, None, preact, activation, **parts
    )
    dx, _, _, dnorm_weight, dnorm_bias = norm_backward(
        dnormalised, dy if residual else None, x, mean, rstd, norm_weight, None, None, None
    )
    return dx, dnorm_weight, dnorm_bias, dfc1, dfc1_bias, dfc2, dfc2_bias, dscale


def _forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    eps: float,
    activation: str,
    residual: bool,
    keep: bool,
    sample_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    launch = backends.implementation("norm_mlp", backend).forward
    return launch(*tensors, eps, activation, residual, keep, sample_scale)


def _fake(x, nw, nb, fc1_weight, b1, fc2_weight, b2, ls, eps, activation, residual, keep, sample_scale, backend):
    y = x.new_empty(x.shape[0], fc2_weight.shape[0])
    if not keep:
        return y, contract.absent(x), contract.absent(x), contract.absent(x)
    statistics = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return y, statistics, torch.empty_like(statistics), x.new_empty(x.shape[0], fc1_weight.shape[0])


def _backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    preact: Tensor,
    activation: str,
    residual: bool,
    sample_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = contract.backward_launcher("norm_mlp", backend, reference_backward)
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc2_weight, fc2_bias, layer_scale, mean, rstd, preact)
    return launch(contract.rows(dy), *tensors, activation, residual, sample_scale)


def _backward_fake(dy, x, nw, nb, fc1_weight, fc2_weight, b2, layer_scale, mean, rstd, preact, act, res, ss, backend):
    width, hidden, out = x.shape[1], fc1_weight.shape[0], fc2_weight.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(width),
        x.new_empty(width),
        x.new_empty(hidden, width),
        x.new_empty(hidden),
        x.new_empty(out, hidden),
        x.new_empty(out),
        contract.absent(x) if layer_scale is None else x.new_empty(out),
    )


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale = inputs[:8]
    _, mean, rstd, preact = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, preact)
    ctx.has_fc1_bias = fc1_bias is not None
    ctx.activation, ctx.residual, sample_scale, ctx.backend = inputs[9], inputs[10], inputs[12], inputs[13]
    parameters = (norm_weight, norm_bias, fc1_weight, fc2_weight, fc2_bias, layer_scale)
    ctx.save_for_backward(x, *parameters, mean, rstd, preact, sample_scale)


def _autograd(ctx, dy, _mean, _rstd, _preact):
    *saved, sample_scale = ctx.saved_tensors
    grads = _backward_op(dy, *saved, ctx.activation, ctx.residual, sample_scale, ctx.backend)
    _, norm_weight, norm_bias, _, _, fc2_bias, layer_scale = saved[:7]
    has_norm, has_bias = norm_weight is not None, norm_bias is not None
    given = (True, has_norm, has_bias, True, ctx.has_fc1_bias, True, fc2_bias is not None, layer_scale is not None)
    return (*(g if here else None for g, here in zip(grads, given, strict=True)), *[None] * 6)


_op, _backward_op = contract.register("norm_mlp", _forward, _fake, _backward, _backward_fake, _setup_context, _autograd)


def prepare_norm_mlp(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    eps=1e-6,
    *,
    activation="gelu",
    layer_scale=None,
    residual=True,
):
    """Check the public arguments and turn them into the launchers'; drop path's factors are not drawn here."""
    op = "norm_mlp"
    contract.check_tensor(op, "x", x, tuple(range(1, 9)))
    contract.check_tensor(op, "fc1_weight", fc1_weight, 2)
    contract.check_tensor(op, "fc2_weight", fc2_weight, 2)
    activation, eps = contract.check_activation(op, activation), contract.check_eps(op, eps)
    width, hidden, out = x.shape[-1], fc1_weight.shape[0], fc2_weight.shape[0]
    if width == 0:
        raise ValueError(f"fastvit.{op}: the normalised dimension of x must not be empty, got shape {tuple(x.shape)}")
    contract.check_like(op, "norm_weight", norm_weight, "x", x, (width,))
    contract.check_like(op, "norm_bias", norm_bias, "x", x, (width,))
    contract.check_like(op, "fc1_weight", fc1_weight, "x", x, (hidden, width))
    contract.check_like(op, "fc1_bias", fc1_bias, "x", x, (hidden,))
    contract.check_like(op, "fc2_weight", fc2_weight, "x", x, (width if residual else out, hidden))
    contract.check_like(op, "fc2_bias", fc2_bias, "x", x, (out,))
    contract.check_like(op, "layer_scale", layer_scale, "x", x, (out,))
    tensors = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    keep = contract.needs_grad(x, *tensors)
    units = tuple(contract.unit_stride(t) for t in tensors)
    return contract.rows(x), *units, eps, activation, bool(residual), keep, None


def norm_mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    *,
    activation: str | None = "gelu",
    layer_scale: Tensor | None = None,
    residual: bool = True,
    drop_path: float = 0.0,
) -> Tensor:
    """LayerNorm → Linear → GELU → Linear → LayerScale → drop path → residual sum:
    y = [x +] keep * layer_scale * (activation(LayerNorm(x) W₁ᵀ + b₁) W₂ᵀ + b₂).

    Args:
        x: (..., D), any strides, fp64 / fp32 / fp16 / bf16.
        norm_weight, norm_bias: (D,) or None; eps is LayerNorm's.
        fc1_weight: (F, D), fc1_bias: (F,) or None; fc2_weight: (D, F), fc2_bias: (D,) or None, as in torch.nn.Linear.
        activation: "gelu" (error function), "gelu_tanh", "quick_gelu" or None.
        layer_scale: (D,) or None (arXiv 2103.17239).
        residual: add x. Without it fc2_weight may be (O, F) and the result is (..., O).
        drop_path: rate of stochastic depth (arXiv 1603.09382) over x's first dimension; each sample's branch is dropped
            with this probability and the survivors are scaled by 1 / (1 - rate). Pass 0 outside training.

    Returns:
        (..., D), contiguous. Under autocast the same steps run as separate fused ops with the dtypes eager has.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit, a negative eps, an unknown activation, or a
            rate outside [0, 1).
    """
    low = None if not isinstance(x, Tensor) else contract.autocast_dtype(x)
    contract.check_rate("norm_mlp", "drop_path", drop_path)
    if low is not None:
        normalised = layer_norm(x, norm_weight, norm_bias, eps)
        hidden = linear(normalised, fc1_weight, fc1_bias, activation=activation)
        if drop_path > 0.0:
            return _add_branch(x, linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale), residual, drop_path)
        return linear(hidden, fc2_weight, fc2_bias, layer_scale=layer_scale, residual=x if residual else None)
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    args = prepare_norm_mlp(*tensors, eps, activation=activation, layer_scale=layer_scale, residual=residual)
    if drop_path > 0.0:
        if not _fuses_drop_path(args, x):
            branch = norm_mlp(*tensors, eps, activation=activation, layer_scale=layer_scale, residual=False)
            return _add_branch(x, branch, residual, drop_path)
        args = (*args[:-1], contract.drop_path_scale(x, drop_path).view(-1))
    backend = backends.select("norm_mlp", *args)
    y = reference(*args) if backend == "reference" else _op(*args, backend)[0]
    return contract.reshaped(y, (*x.shape[:-1], fc2_weight.shape[0]))


def _fuses_drop_path(args, x: Tensor) -> bool:
    """Whether a kernel here takes drop path's factors, which it does by sample: x must have a dimension of them."""
    return x.dim() > 1 and backends.serving("norm_mlp", *args[:-1], x.new_empty(x.shape[0])) is not None


def _add_branch(x: Tensor, branch: Tensor, residual: bool, drop_path: float) -> Tensor:
    branch = branch * contract.drop_path_scale(branch, drop_path)
    return x + branch if residual else branch
