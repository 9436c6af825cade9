"""What every op has in common: argument checks, autocast, and the registration of schema, fake and autograd.

An op is registered once. Its schema is the launchers' signature plus the backend's name; its backward is an operator of
its own, so asking for a second derivative raises instead of being silently wrong.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import backends

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, value: Any, rank: int | tuple[int, ...]) -> None:
    """Raise TypeError / ValueError unless ``value`` is a floating-point tensor of that rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvit.{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"fastvit.{op}: {name} must be a floating-point tensor, got {value.dtype}")
    ranks = (rank,) if isinstance(rank, int) else rank
    if value.dim() not in ranks:
        wanted = " or ".join(f"{r}-D" for r in ranks)
        raise ValueError(f"fastvit.{op}: {name} must be {wanted}, got shape {tuple(value.shape)}")


def check_like(op: str, name: str, value: Any, like_name: str, like: Tensor, shape: Sequence[int]) -> None:
    """Raise unless ``value`` is None or a tensor with ``like``'s dtype and device and exactly that shape."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvit.{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype != like.dtype:
        raise TypeError(f"fastvit.{op}: {name} must have {like_name}'s dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"fastvit.{op}: {name} must be on {like_name}'s device {like.device}, got {value.device}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"fastvit.{op}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def check_eps(op: str, eps: Any) -> float:
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"fastvit.{op}: eps must be a number >= 0, got {eps!r}")
    return float(eps)


def check_rate(op: str, name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"fastvit.{op}: {name} must be in [0, 1), got {value!r}")
    return value


def check_activation(op: str, activation: str | None) -> str:
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS:
        raise ValueError(f"fastvit.{op}: activation must be None or one of {ACTIVATIONS[1:]}, got {activation!r}")
    return activation


T = TypeVar("T", Tensor, Tensor | None)


def unit_stride(tensor: T) -> T:
    """The tensor itself, or a copy whose last dimension is contiguous: what every launcher may rely on."""
    if tensor is None or tensor.dim() == 0 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def rows(tensor: Tensor) -> Tensor:
    """(..., D) as (M, D) with contiguous rows, a view wherever the strides allow one."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def reshaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A result that nobody else holds in another shape, and no view of it: wrappers such as FSDP mind views."""
    return fresh if fresh.shape == tuple(shape) else torch.ops.aten._unsafe_view.default(fresh, shape)


def drop_path_scale(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth's factor per sample (B, 1, ..., 1): 0 or 1 / (1 - rate).

    Drawn as timm's DropPath draws it, so that the same generator state drops the same samples.
    """
    return x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1.0 - rate).div_(1.0 - rate)


def per_row(sample_scale: Tensor, row_count: int) -> Tensor:
    """One factor per sample (S,) as one per row (M, 1); a sample's rows are neighbours."""
    return sample_scale[:, None].expand(-1, row_count // max(1, sample_scale.shape[0])).reshape(-1, 1)


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for this tensor's device; the meta device has none."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on this tensor's device now, or None outside autocast."""
    if autocasting(tensor) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return None


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in ``dtype``; None stays None and boolean tensors stay boolean."""
    return tuple(t if t is None or t.dtype == torch.bool else t.to(dtype) for t in tensors)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def absent(like: Tensor) -> Tensor:
    """The stand-in an operator returns for an output it was not asked for: no elements."""
    return like.new_empty(0)


def register(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    backward_fake: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    autograd: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """Register ``fastvit::<name>`` and ``fastvit::<name>_backward`` with fakes and the autograd formula.

    Without ``backward`` the op is for inference alone, and there is no second one.

    Args:
        forward, backward: functions annotated with the operator's schema, the backend's name last.
        fake, backward_fake: the same signatures, returning tensors of the right shapes, dtypes and strides.
        setup_context, autograd: as in :func:`torch.library.register_autograd`.
    """
    forward_op = torch.library.custom_op(f"fastvit::{name}", forward, mutates_args=())
    forward_op.register_fake(fake)
    if backward is None or backward_fake is None or autograd is None:
        return forward_op, None
    inputs = len(inspect.signature(forward).parameters)

    def unless_unused(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None,) * inputs if all(g is None for g in grads) else autograd(ctx, *grads)

    forward_op.register_autograd(unless_unused, setup_context=setup_context)
    backward_op = torch.library.custom_op(f"fastvit::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(backward_fake)
    return forward_op, backward_op


def backward_launcher(op: str, backend: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The backend's own backward, or else the reference's, with those parts of it that the backend has."""
    implementation = backends.implementation(op, backend)
    own = getattr(implementation, "backward", None)
    return own or functools.partial(reference, **getattr(implementation, "backward_parts", {}))
