"""What the adapters share: torch's own modules, which stand in any library's model."""

import inspect
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..fused import normed
from . import Options, Plan


def same_forward(module: Any, *classes: type[nn.Module]) -> bool:
    """Whether a module computes what one of these classes does: it is one, and did not override forward."""
    return any(isinstance(module, c) and _own(type(module)) is _own(c) for c in classes)


def _own(kind: type[nn.Module]) -> Any:
    """A class's forward below the decorators: FSDP's subclasses of a layer of transformers are decorated once more."""
    return inspect.unwrap(kind.forward)


def why_not_norm(norm: Any, *classes: type[nn.Module]) -> str | None:
    """Why a module is no LayerNorm over the last dimension, in torch's own or one of these classes."""
    if not same_forward(norm, nn.LayerNorm, *classes):
        return f"{type(norm).__name__} is not a LayerNorm"
    if len(norm.normalized_shape) != 1:
        return f"it normalises {len(norm.normalized_shape)} dimensions, not the last one"
    return None


def why_not_linear(name: str, linear: Any) -> str | None:
    """Why the ops cannot read a linear layer's weight themselves."""
    return None if type(linear) is nn.Linear else f"{name} is a {type(linear).__name__}, not a torch.nn.Linear"


def layer_norm_forward(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension."""
    return normed(x, (norm.weight, norm.bias, norm.eps))


def plan_layer_norm(module: nn.Module, options: Options, *classes: type[nn.Module]) -> Plan | str | None:
    """How to fuse a LayerNorm by itself, torch's own or one of these classes, wherever it stands."""
    if not isinstance(module, nn.LayerNorm):
        return None
    reason = why_not_norm(module, *classes) if options.layer_norm else "layer_norm=False"
    return reason or Plan(layer_norm_forward, ("layer_norm",))


def why_not_patches(conv: Any) -> str | None:
    """Why a convolution does not cut an image into patches and project each."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not a torch.nn.Conv2d"
    if conv.stride != conv.kernel_size:
        return f"its stride {conv.stride} is not its kernel size {conv.kernel_size}: patches overlap, or leave gaps"
    if conv.padding not in ("valid", (0, 0)) or conv.dilation != (1, 1) or conv.groups != 1:
        return "it pads, dilates or works in groups"
    return None


def patches_forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution over patches, (B, C, height, width) to (B, D, rows, columns); what fills no patch is left."""
    p, q = conv.kernel_size
    rows, columns = x.shape[-2] // p, x.shape[-1] // q
    if x.dim() != 4 or not rows or not columns or not x.is_floating_point():  # its own error message
        return type(conv).forward(conv, x)
    y = ops.patch_embed(x[..., : rows * p, : columns * q], conv.weight, conv.bias)
    return y.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def plan_patches(conv: Any, options: Options) -> Plan | str:
    """How to fuse a model's projection of patches."""
    reason = why_not_patches(conv) if options.patch_embed else "patch_embed=False"
    return reason or Plan(patches_forward, ("patch_embed",))
