"""Group normalisation, optionally followed by ReLU: y = relu((x - E[x]) / sqrt(V[x] + eps) * weight + bias).

Group Normalization, arXiv 1803.08494; the hybrids of "An Image is Worth 16x16 Words" (arXiv 2010.11929, section 3.1)
put it between the weight-standardised convolutions of their ResNet stems.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _contract as contract

OP = "group_norm"
LOW = (torch.float16, torch.bfloat16)
# On a CPU our way to the kernel takes 0.03 ms longer than PyTorch's, with gradients 0.15 ms: maps of 0.2 million
# numbers are done 0.8 to 0.9 times as fast, of 0.4 million 1.1 to 1.4 times (Xeon, AVX-512, one thread, float32).
FEWEST = 1 << 18


def reference(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool) -> Tensor:
    """Plain PyTorch, of maps (B, C, ...)."""
    if weight is None and bias is not None:  # PyTorch differentiates no bias without a weight
        weight = torch.ones_like(bias)
    dtypes = {x.dtype, *(t.dtype for t in (weight, bias) if t is not None)}
    if len(dtypes) > 1:
        wide_x, weight, bias = contract.cast(torch.float32, x, weight, bias)
        y = F.group_norm(wide_x, num_groups, weight, bias, eps).to(x.dtype)
    else:
        y = F.group_norm(x, num_groups, weight, bias, eps)
    return torch.relu_(y) if relu else y


def reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias) of maps x (B, C, positions), in fp32 inside.

    With n = (x - mean) rstd and u = dy where n weight + bias is not <= 0: g = u weight, dx = rstd (g - E[g] - n E[g n])
    over each group, dweight = Σ u n, dbias = Σ u.
    """
    wide, groups = mean.dtype, mean.shape[1]
    by_group = (x.to(wide).unflatten(1, (groups, -1)) - mean[:, :, None, None]) * rstd[:, :, None, None]
    n, u = by_group.reshape(x.shape), dy.to(wide)
    gamma = n.new_ones(x.shape[1]) if weight is None else weight.to(wide)
    beta = torch.zeros_like(gamma) if bias is None else bias.to(wide)
    if relu:
        u = u.masked_fill(n * gamma[:, None] + beta[:, None] <= 0, 0.0)
    g = (u * gamma[:, None]).view_as(by_group)
    level, slope = g.mean((2, 3), keepdim=True), (g * by_group).mean((2, 3), keepdim=True)
    dx = (rstd[:, :, None, None] * (g - level - by_group * slope)).reshape(x.shape)
    kept = [x.dtype if parameter is None else parameter.dtype for parameter in (weight, bias)]
    return _like(x).copy_(dx), (u * n).sum((0, 2)).to(kept[0]), u.sum((0, 2)).to(kept[1])


def maps(x: Tensor) -> Tensor:
    """(B, C, ...) as (B, C, positions) of dense samples, channels first or last: a view wherever that is one."""
    flat = x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    return flat if _steps(flat, flat.shape[2], 1) or channels_last(flat) else flat.contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether the channels of each position of dense maps are neighbours."""
    return not _steps(x, x.shape[2], 1) and _steps(x, 1, x.shape[1])


def _steps(x: Tensor, channel: int, position: int) -> bool:
    _, channels, positions = x.shape
    return (channels == 1 or x.stride(1) == channel) and (positions <= 1 or x.stride(2) == position)


def _like(x: Tensor) -> Tensor:
    """New maps in x's order, their samples one after the other."""
    if channels_last(x):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


def _forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.implementation(OP, backend).forward(x, num_groups, weight, bias, eps, relu)


def _fake(x, num_groups, weight, bias, eps, relu, backend):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(x.shape[0], num_groups, dtype=wide)
    return _like(x), mean, torch.empty_like(mean)


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = contract.backward_launcher(OP, backend, reference_backward)
    if not channels_last(x):
        dy = dy if _steps(dy, dy.shape[2], 1) else dy.contiguous()
    elif not _steps(dy, 1, dy.shape[1]):
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    return launch(dy, x, mean, rstd, weight, bias, relu)


def _backward_fake(dy, x, mean, rstd, weight, bias, relu, backend):
    dweight, dbias = (x.new_empty(x.shape[1], dtype=(x if p is None else p).dtype) for p in (weight, bias))
    return _like(x), dweight, dbias


def _setup_context(ctx, inputs, output):
    x, _, weight, bias, _, relu, backend = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.relu, ctx.backend = relu, backend
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _autograd(ctx, dy, _mean, _rstd):
    x, mean, rstd, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward_op(dy, x, mean, rstd, weight, bias, ctx.relu, ctx.backend)
    return dx, None, None if weight is None else dweight, None if bias is None else dbias, None, None, None


_op, _backward_op = contract.register(OP, _forward, _fake, _backward, _backward_fake, _setup_context, _autograd)


def prepare_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = False,
):
    """Check the public arguments and turn them into the launchers'."""
    contract.check_tensor(OP, "x", x, tuple(range(2, 9)))
    eps = contract.check_eps(OP, eps)
    channels = x.shape[1]
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
        raise ValueError(f"fastvit.{OP}: num_groups must be a positive integer, got {num_groups!r}")
    if channels == 0 or channels % num_groups:
        raise ValueError(f"fastvit.{OP}: x's {channels} channels cannot be shared evenly by {num_groups} groups")
    if contract.autocasting(x) and x.device.type != "cpu":  # on a CPU, torch's group_norm does not heed autocast
        x, weight, bias = contract.cast(torch.promote_types(x.dtype, torch.float32), x, weight, bias)
    for name, value in (("weight", weight), ("bias", bias)):
        wide = isinstance(value, Tensor) and value.dtype == torch.float32 and x.dtype in LOW
        like = x.new_empty(0, dtype=torch.float32) if wide else x
        contract.check_like(OP, name, value, "x", like, (channels,))
    return maps(x), num_groups, contract.unit_stride(weight), contract.unit_stride(bias), eps, bool(relu)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = False,
) -> Tensor:
    """Normalise each group of channels of each image: y = (x - E[x]) / sqrt(V[x] + eps) * weight + bias.

    Mean and variance are over the channels of a group and all positions, in fp32 and in two passes. On a CPU, "auto"
    leaves maps of fewer than 2^18 numbers to PyTorch, which is done with them sooner.

    Args:
        x: (B, C, ...), of two dimensions or more, fp64 / fp32 / fp16 / bf16. Contiguous and channels last maps are read
            in place, any other is copied.
        num_groups: G, a divisor of C; consecutive channels make a group.
        weight, bias: (C,) with x's dtype, or fp32 where that has 16 bits; or None.
        eps: added to the variance, inside the root.
        relu: y = max(y, 0) in the same pass; NaN stays NaN. The backward computes y's sign again.

    Returns:
        As x, contiguous or channels last. Under autocast as torch's group_norm: fp32 on a GPU, x's dtype on a CPU.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit, groups that do not divide C, a negative eps.

    Source: Group Normalization, arXiv 1803.08494, equations 1, 2, 6 and 7.
    """
    args = prepare_group_norm(x, num_groups, weight, bias, eps, relu=relu)
    backend = backends.select(OP, *args)
    if backend == "cpu" and x.numel() < FEWEST and backends.requested() == "auto":
        backend = "reference"
    if backend == "reference":
        return reference(x.to(args[0].dtype), *args[1:])
    # The dispatcher's way through Python takes as long as a map of 28 x 28: only who needs it goes it.
    needs_op = contract.needs_grad(x, weight, bias) or torch.compiler.is_compiling() or type(x) is not Tensor
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = _op if needs_op else _forward
    y = run(*args, backend)[0]
    if channels_last(y):  # by way of (B, ..., C): a single image's strides, too, tell torch the layout
        return y.transpose(1, 2).unflatten(1, x.shape[2:]).movedim(-1, 1)
    return contract.reshaped(y, x.shape)
