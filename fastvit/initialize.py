"""Initial weights, by timm's names."""

import math
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def _timm(module: nn.Module, name: str, head_bias: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def zeroed(module: Module) -> Module:
    """The module, all its parameters zero: how a new head starts (paper, section 3.2)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _zero_head(module: nn.Module, name: str, head_bias: float) -> None:
    _timm(module, name, head_bias)
    if name == "head" and isinstance(module, nn.Linear):
        zeroed(module)


def _jax(module: nn.Module, name: str, head_bias: float) -> None:
    if isinstance(module, nn.Linear):
        if name == "head":
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, head_bias)
            return
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6) if ".mlp" in name else nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_in = module.weight[0].numel()
        std = math.sqrt(1.0 / fan_in) / 0.87962566103423978  # the spread a normal loses when cut at two sigmas
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _moco(module: nn.Module, name: str, head_bias: float) -> None:
    if isinstance(module, nn.Linear):
        if name.endswith("qkv"):
            bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SCHEMES: dict[str, Callable[[nn.Module, str, float], None]] = {
    "": _timm,
    "zero_head": _zero_head,
    "jax": _jax,
    "jax_nlhb": _jax,
    "moco": _moco,
}


def initialize(model: nn.Module, scheme: str, num_classes: int) -> None:
    """Initialise a VisionTransformer in place.

    Args:
        scheme: "" (timm's), "zero_head" (timm's with a zero head weight), "jax" (the original's, zero head), "jax_nlhb"
            (with head bias -ln K), "moco", "reset" (each module's own), "skip" (leave what construction left).
        num_classes: K.
    """
    if scheme == "skip":
        return
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.startswith("pos_embed") or name.endswith("relative_keys"):
            nn.init.trunc_normal_(parameter, std=0.02)
    for name in ("cls_token", "reg_token"):
        if name in parameters:
            nn.init.normal_(parameters[name], std=1e-6)
    if scheme == "reset":
        return
    head_bias = -math.log(num_classes) if scheme == "jax_nlhb" and num_classes > 0 else 0.0
    for name, module in model.named_modules():
        _SCHEMES[scheme](module, name, head_bias)
