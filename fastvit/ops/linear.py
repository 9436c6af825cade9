"""Linear layer with its epilogue: y = residual + sample_scale * layer_scale * activation(x Wᵀ + b).

LayerScale is arXiv 2103.17239, stochastic depth (sample_scale: one factor per sample) arXiv 1603.09382.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _contract as contract


def activate(x: Tensor, activation: str) -> Tensor:
    """GELU by the error function (arXiv 1606.08415), by tanh, by x·sigmoid(1.702x), or nothing."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return x


def activation_backward(dy: Tensor, preact: Tensor, activation: str) -> Tensor:
    """dy * activation'(preact) in their dtype, fp32 inside."""
    if activation == "quick_gelu":
        wide = preact.to(torch.promote_types(dy.dtype, torch.float32))
        gate = torch.sigmoid(1.702 * wide)
        return (dy * gate * (1 + 1.702 * wide * (1 - gate))).to(dy.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, preact, approximate=approximate)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep_preact: bool = False,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; ``keep_preact`` belongs to the launchers and means nothing here."""
    y = activate(F.linear(x, weight, bias), activation)
    y = y if layer_scale is None else y * layer_scale
    y = y if sample_scale is None else y * contract.per_row(sample_scale, x.shape[0])
    return y if residual is None else residual + y


def column_sum(rows: Tensor) -> Tensor:
    """Σ over rows in fp32 (fp64 for fp64)."""
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))


def reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    preact: Tensor,
    activation: str,
    sample_scale: Tensor | None = None,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    column_sum: Callable[[Tensor], Tensor] = column_sum,
    activation_backward: Callable[[Tensor, Tensor, str], Tensor] = activation_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias, dlayer_scale); the residual's is dy itself.

    A backend may bring its own product of two matrices, its own sum of rows in fp32 and its own
    :func:`activation_backward` of tensors of one dtype.

    Without an activation the output need not be kept for LayerScale: with G = dyᵀ x,
    dlayer_scale = Σ_k W G + b Σ dy and dweight = layer_scale G. A sample's factor goes into dy first.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    dy = dy if sample_scale is None else dy * contract.per_row(sample_scale, dy.shape[0])
    if layer_scale is None or activation == "none":
        d = dy if activation == "none" else activation_backward(dy, preact, activation)
        dweight, dbias = product(d.t(), x), column_sum(d)
        if layer_scale is None:
            return product(d, weight), dweight, dbias.to(dy.dtype), contract.absent(dy)
        dscale = (weight.to(wide) * dweight.to(wide)).sum(1)
        dscale = dscale if bias is None else dscale + bias.to(wide) * dbias
        dx = product(dy * layer_scale, weight)
        dbias = (dbias * layer_scale.to(wide)).to(dy.dtype)
        return dx, dweight * layer_scale[:, None], dbias, dscale.to(dy.dtype)
    dscale = (dy.to(wide) * activate(preact.to(wide), activation)).sum(0).to(dy.dtype)
    d = activation_backward(dy.to(wide) * layer_scale.to(wide), preact.to(wide), activation)
    dbias, d = column_sum(d).to(dy.dtype), d.to(dy.dtype)
    return product(d, weight), product(d.t(), x), dbias, dscale


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep_preact: bool,
    sample_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    launch = backends.implementation("linear", backend).forward
    return launch(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale)


def _fake(x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale, backend):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep_preact else contract.absent(x)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    preact: Tensor,
    activation: str,
    sample_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = contract.backward_launcher("linear", backend, reference_backward)
    tensors = contract.rows(dy), x, weight, bias, layer_scale, preact
    dx, dweight, dbias, dscale = launch(*tensors, activation, sample_scale)
    return dx, dweight, contract.absent(dy) if bias is None else dbias, dscale


def _backward_fake(dy, x, weight, bias, layer_scale, preact, activation, sample_scale, backend):
    dbias, dscale = (contract.absent(dy) if t is None else torch.empty_like(t) for t in (bias, layer_scale))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dscale


def _setup_context(ctx, inputs, output):
    x, weight, bias, layer_scale, residual, activation, _, sample_scale, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.has_residual = residual is not None
    ctx.activation, ctx.backend = activation, backend
    ctx.save_for_backward(x, weight, bias, layer_scale, output[1], sample_scale)


def _autograd(ctx, dy, _preact):
    *saved, sample_scale = ctx.saved_tensors
    _, _, bias, layer_scale, _ = saved
    dx, dweight, dbias, dscale = _backward_op(dy, *saved, ctx.activation, sample_scale, ctx.backend)
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if layer_scale is None else dscale,
        dy if ctx.has_residual else None,
        None,
        None,
        None,
        None,
    )


_op, _backward_op = contract.register("linear", _forward, _fake, _backward, _backward_fake, _setup_context, _autograd)


def prepare_linear(x, weight, bias=None, *, activation=None, layer_scale=None, residual=None, drop_path=0.0):
    """Check the public arguments and turn them into the launchers'; the sample factors are drawn later."""
    contract.check_rate("linear", "drop_path", drop_path)
    contract.check_tensor("linear", "x", x, tuple(range(1, 9)))
    contract.check_tensor("linear", "weight", weight, 2)
    if drop_path > 0.0 and x.dim() == 1:
        raise ValueError(f"fastvit.linear: drop_path needs x to have a batch dimension, got shape {tuple(x.shape)}")
    activation = contract.check_activation("linear", activation)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fastvit.linear: x must end in weight's input width {weight.shape[1]}, got shape {tuple(x.shape)}"
        )
    width = weight.shape[0]
    contract.check_like("linear", "weight", weight, "x", x, weight.shape)
    contract.check_like("linear", "bias", bias, "x", x, (width,))
    contract.check_like("linear", "layer_scale", layer_scale, "x", x, (width,))
    contract.check_like("linear", "residual", residual, "x", x, (*x.shape[:-1], width))
    keep_preact = (activation != "none") and contract.needs_grad(x, weight, bias, layer_scale)
    return (
        contract.rows(x),
        contract.unit_stride(weight),
        contract.unit_stride(bias),
        contract.unit_stride(layer_scale),
        None if residual is None else contract.rows(residual),
        activation,
        keep_preact,
        None,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    drop_path: float = 0.0,
) -> Tensor:
    """Linear layer with its epilogue in one pass: y = residual + layer_scale * activation(x Wᵀ + b).

    Args:
        x: (..., K), any strides, fp64 / fp32 / fp16 / bf16.
        weight: (N, K), as in torch.nn.Linear.
        bias, layer_scale: (N,) or None.
        activation: None, "gelu" (error function), "gelu_tanh" or "quick_gelu" (x·sigmoid(1.702x)).
        residual: (..., N) or None.
        drop_path: rate of stochastic depth (arXiv 1603.09382); each sample x[i] loses all but its residual with this
            probability and the others' product is scaled by 1 / (1 - rate). Pass 0 outside training.

    Returns:
        (..., N), contiguous. Under autocast the product runs in autocast's dtype and a residual keeps its own, as the
        eager sum would.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit, an unknown activation, or a rate outside
            [0, 1).
    """
    low = None if not isinstance(x, Tensor) else contract.autocast_dtype(x)
    if low is not None:
        x, weight, bias = contract.cast(low, x, weight, bias)
        if any(t is not None and t.dtype != low for t in (layer_scale, residual)):
            y = linear(x, weight, bias, activation=activation)
            y = y if layer_scale is None else y * layer_scale
            contract.check_rate("linear", "drop_path", drop_path)
            return _add(y, residual, contract.drop_path_scale(y, drop_path) if drop_path > 0.0 else None)
    args = prepare_linear(
        x, weight, bias, activation=activation, layer_scale=layer_scale, residual=residual, drop_path=drop_path
    )
    if drop_path > 0.0:
        factor = contract.drop_path_scale(x, drop_path)
        fused = (*args[:-1], factor.view(-1))
        if backends.serving("linear", *fused) is None:
            return _add(linear(x, weight, bias, activation=activation, layer_scale=layer_scale), residual, factor)
        args = fused
    backend = backends.select("linear", *args)
    y = reference(*args) if backend == "reference" else _op(*args, backend)[0]
    return contract.reshaped(y, (*x.shape[:-1], weight.shape[0]))


def _add(y: Tensor, residual: Tensor | None, factor: Tensor | None) -> Tensor:
    y = y if factor is None else y * factor
    return y if residual is None else residual + y
