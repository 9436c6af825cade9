"""Weights in one copy: linear layers that the CPU's encoder kernel runs, kept as it reads them, and the way back."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import backends, prepack
from .fused import INT8, LINEARS, encodable, has_hooks, is_fused_block
from .parts import Place, linear_places, parts_of
from .prepack import Released


def _why_not(block: Any) -> str | None:
    """Why the encoder's kernel does not run this block at inference, or None when it does."""
    parts = parts_of(block)
    if len(parts.attention.qkv_weights) != 1:
        return "it keeps queries, keys and values in weights of their own, which the kernel reads as one"
    if not encodable(parts):
        return "it normalises queries and keys, has relative positions, or its heads are wider than the model"
    if has_hooks(block):
        return "a module inside it carries a hook, which the kernel would skip"
    (weight,) = parts.attention.qkv_weights
    x, dtype = torch.empty(0, 1, 1, dtype=weight.dtype, device=weight.device), str(weight.dtype).removeprefix("torch.")
    return backends.why_not("encoder", (x, [], [], 1, 1.0, "none", dtype, []), "cpu")


def release(model: nn.Module, rounded: bool = False) -> None:
    """Leave the blocks' linear weights in the encoder kernel's layout alone.

    A weight that a module outside these blocks shares stays as it is.

    Args:
        rounded: as the kernel computes with them now, int8 or bfloat16, which may not hold the original's numbers.

    Raises:
        ValueError: no block of the model runs in that kernel, and why.
    """
    blocks = {name: module for name, module in model.named_modules() if is_fused_block(module)}
    reasons = {name: reason for name, block in blocks.items() if (reason := _why_not(block))}
    if len(reasons) == len(blocks):
        detail = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no fused block"
        raise ValueError(
            "fastvit: release_original=True, but the CPU's encoder kernel runs no block of "
            f"{type(model).__name__}: {detail}"
        )
    served: dict[int, tuple[str, Place, bool]] = {}
    for name, block in blocks.items():
        if name not in reasons:
            int8 = block.__dict__.get(INT8, (False,) * LINEARS)
            for (place,), its in zip(linear_places(block), int8, strict=True):
                served.setdefault(id(place.module), (f"{name}.{place.layer}".lstrip("."), place, its))
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    uses.subtract(id(getattr(place.module, place.parameter)) for _, place, _ in served.values())
    made: dict[int, Released] = {}
    with torch.inference_mode(False):
        for name, place, int8 in served.values():
            weight: Any = getattr(place.module, place.parameter)
            key = id(weight)
            if type(weight) in (nn.Parameter, Released) and uses[key] == 0:
                if key not in made:
                    compute = prepack.compute_of(weight.dtype)
                    compute = compute if not rounded else "int8" if int8 else "bfloat16"
                    made[key] = Released(prepack.weight(weight, compute), compute, weight, f"{name}.weight")
                setattr(place.module, place.parameter, made[key])


def check_exact(function: str, model: nn.Module) -> None:
    """Raise RuntimeError, naming the layers, if originals are gone for good."""
    lost = [p.path for p in model.parameters() if isinstance(p, Released) and not p.exact]
    if lost:
        raise RuntimeError(
            f"fastvit.{function}: the originals of {len(lost)} layers were released and rounded copies are left: load "
            f"them from your checkpoint (model.load_state_dict) first: {', '.join(lost)}"
        )


def give_back(model: nn.Module) -> None:
    """Undo :func:`release`: ordinary parameters again, with the numbers and the requires_grad of before.

    Raises:
        RuntimeError: originals are gone for good; nothing has changed then.
    """
    check_exact("restore", model)
    owned: Iterator[Any] = ((m, *item) for m in model.modules() for item in m._parameters.items())
    found = [(module, key, p) for module, key, p in owned if isinstance(p, Released)]
    prepack.forget(p for _, _, p in found)
    made: dict[int, nn.Parameter] = {}
    with torch.inference_mode(False):
        while found:  # each packed copy goes as soon as its numbers are unpacked
            module, key, weight = found.pop()
            if id(weight) not in made:
                made[id(weight)] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
            setattr(module, key, made[id(weight)])


def is_released(model: nn.Module) -> bool:
    """Whether originals of this model were released."""
    return any(isinstance(p, Released) for p in model.parameters())
