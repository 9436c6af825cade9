"""Layer normalisation, optionally of a residual sum.

z = residual + sample_scale * layer_scale * x, y = (z - E[z]) / sqrt(V[z] + eps) * weight + bias.

Equations 2 and 3 of "An Image is Worth 16x16 Words" (arXiv 2010.11929); LayerNorm is arXiv 1607.06450, LayerScale
arXiv 2103.17239, stochastic depth (sample_scale: one factor per sample) arXiv 1603.09382.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _contract as contract


def reference(
    x: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sample_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (normalised, new residual)."""
    z = x if layer_scale is None else x * layer_scale
    z = z if sample_scale is None else z * contract.per_row(sample_scale, x.shape[0])
    z = z if residual is None else residual + z
    return F.layer_norm(z, z.shape[-1:], weight, bias, eps), z


def reference_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dresidual, dx, dlayer_scale, dweight, dbias) for rows z (M, D), in fp32 inside.

    With n = (z - mean) rstd and g = dy weight: d = rstd (g - E[g] - n E[g n]) + dz is the residual's gradient,
    dx = d sample_scale layer_scale, dlayer_scale = Σ d sample_scale x, dweight = Σ dy n, dbias = Σ dy.
    dx is absent where nothing scales x (it is d), dlayer_scale where there is none.
    """
    wide, width = mean.dtype, z.shape[1]
    gamma = torch.ones(width, dtype=wide, device=z.device) if weight is None else weight.to(wide)
    d, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), z.to(wide), (width,), mean[:, None], rstd[:, None], gamma, gamma, (True, True, True)
    )
    d = d if dz is None else d + dz.to(wide)
    branch = d if sample_scale is None else d * contract.per_row(sample_scale, z.shape[0]).to(wide)
    dlayer_scale = contract.absent(z)
    if layer_scale is not None and x is not None:
        dlayer_scale = (branch * x.to(wide)).sum(0).to(z.dtype)
        branch = branch * layer_scale.to(wide)
    dx = contract.absent(z) if branch is d else branch.to(z.dtype)
    return d.to(z.dtype), dx, dlayer_scale, dweight.to(z.dtype), dbias.to(z.dtype)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sample_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = backends.implementation("layer_norm", backend).forward
    return launch(x, residual, layer_scale, weight, bias, eps, sample_scale)


def _fake(x, residual, layer_scale, weight, bias, eps, sample_scale, backend):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    z = contract.absent(x) if residual is None else torch.empty_like(y)
    statistics = x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return y, z, statistics, torch.empty_like(statistics)


def _backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = contract.backward_launcher("layer_norm", backend, reference_backward)
    dy, dz = contract.rows(dy), None if dz is None else contract.rows(dz)
    return launch(dy, dz, z, mean, rstd, weight, x, layer_scale, sample_scale)


def _backward_fake(dy, dz, z, mean, rstd, weight, x, layer_scale, sample_scale, backend):
    d, row = torch.empty_like(z, memory_format=torch.contiguous_format), z.new_empty(z.shape[1])
    unscaled = layer_scale is None and sample_scale is None
    dx = contract.absent(z) if unscaled else torch.empty_like(d)
    dlayer_scale = contract.absent(z) if layer_scale is None else torch.empty_like(row)
    return d, dx, dlayer_scale, row, torch.empty_like(row)


def _setup_context(ctx, inputs, output):
    x, residual, layer_scale, weight, bias, _, sample_scale, backend = inputs
    _, z, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_residual = residual is not None
    ctx.has_bias = bias is not None
    ctx.backend = backend
    scaled = x if layer_scale is not None else None
    z = z if ctx.has_residual else x
    ctx.save_for_backward(z, mean, rstd, weight, scaled, layer_scale, sample_scale)


def _autograd(ctx, dy, dz, _mean, _rstd):
    z, mean, rstd, weight, x, layer_scale, sample_scale = ctx.saved_tensors
    if dy is None:
        dy = z.new_zeros(1, z.shape[1]).expand_as(z)
    d, dx, dlayer_scale, dweight, dbias = _backward_op(
        dy, dz if ctx.has_residual else None, z, mean, rstd, weight, x, layer_scale, sample_scale, ctx.backend
    )
    return (
        d if layer_scale is None and sample_scale is None else dx,
        d if ctx.has_residual else None,
        dlayer_scale if layer_scale is not None else None,
        dweight if weight is not None else None,
        dbias if ctx.has_bias else None,
        None,
        None,
        None,
    )


_op, _backward_op = contract.register(
    "layer_norm", _forward, _fake, _backward, _backward_fake, _setup_context, _autograd
)


def prepare_layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6):
    """Check the public arguments and turn them into the launchers'."""
    return _prepare("layer_norm", x, None, weight, bias, eps, None)


def prepare_add_layer_norm(x, residual, weight=None, bias=None, eps=1e-6, *, layer_scale=None, drop_path=0.0):
    """Check the public arguments and turn them into the launchers'."""
    contract.check_rate("add_layer_norm", "drop_path", drop_path)
    contract.check_tensor("add_layer_norm", "residual", residual, tuple(range(1, 9)))
    return _prepare("add_layer_norm", x, residual, weight, bias, eps, layer_scale)


def _prepare(op, x, residual, weight, bias, eps, layer_scale):
    contract.check_tensor(op, "x", x, tuple(range(1, 9)))
    eps = contract.check_eps(op, eps)
    if contract.autocasting(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        x, residual, weight, bias, layer_scale = contract.cast(wide, x, residual, weight, bias, layer_scale)
    width = x.shape[-1]
    contract.check_like(op, "residual", residual, "x", x, x.shape)
    for name, value in (("layer_scale", layer_scale), ("weight", weight), ("bias", bias)):
        contract.check_like(op, name, value, "x", x, (width,))
    if width == 0:
        raise ValueError(f"fastvit.{op}: the normalised dimension of x must not be empty, got shape {tuple(x.shape)}")
    vectors = tuple(contract.unit_stride(t) for t in (layer_scale, weight, bias))
    return contract.rows(x), None if residual is None else contract.rows(residual), *vectors, eps, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Normalise the last dimension: y = (x - E[x]) / sqrt(V[x] + eps) * weight + bias, statistics in fp32.

    Args:
        x: (..., D), any strides, fp64 / fp32 / fp16 / bf16.
        weight, bias: (D,) with x's dtype, or None.
        eps: added to the variance, inside the root.

    Returns:
        (..., D), contiguous.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit, or a negative eps.

    Source: Layer Normalization, arXiv 1607.06450, equation 4.
    """
    args = prepare_layer_norm(x, weight, bias, eps)
    return _run(args, backends.select("layer_norm", *args), x)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_path: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum: z = residual + layer_scale * x, y = LayerNorm(z).

    Args:
        x, residual: (..., D), same shape and dtype.
        weight, bias, layer_scale: (D,) or None.
        eps: added to the variance, inside the root.
        drop_path: rate of stochastic depth (arXiv 1603.09382); each sample's branch is dropped with this probability
            and the survivors are scaled by 1 / (1 - rate). Pass 0 outside training.

    Returns:
        (y, z): the normalised rows and the new residual, both (..., D).

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit, a negative eps, or a rate outside [0, 1).
    """
    args = prepare_add_layer_norm(x, residual, weight, bias, eps, layer_scale=layer_scale, drop_path=drop_path)
    if drop_path > 0.0:
        args = _with_drop_path(args, x, drop_path)
    return _run(args, backends.select("layer_norm", *args), x)


def _with_drop_path(args, x: Tensor, rate: float):
    """The launchers' arguments with stochastic depth: fused, or applied to x where no kernel here fuses it."""
    dtype, factor = args[0].dtype, contract.drop_path_scale(x, rate)
    fused = (*args[:-1], factor.view(-1).to(dtype))
    if x.dim() > 1 and backends.serving("layer_norm", *fused) is not None:
        return fused
    return contract.rows(x.to(dtype) * factor.to(dtype)), *args[1:]


def _run(args, backend: str, x: Tensor) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        y, z = reference(*args)
    else:
        y, z, _, _ = _op(*args, backend)
    if x.device.type == "cpu":
        y = y.to(x.dtype)  # autocast: torch normalises in fp32 on both devices, and returns x's dtype on the CPU only
    return y.view(x.shape), z.view(x.shape) if args[1] is not None else z
