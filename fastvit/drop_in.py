"""Fused forwards for other people's Vision Transformers: bound to module instances, removed without a trace.

Classes, parameters, state_dict keys and hooks stay as they are; nothing global is changed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from . import backends, layers, ops, prepack
from .fused import (
    BLOCK_OPS,
    INT8,
    KINDS,
    KNOWN,
    MARK,
    has_hooks,
    has_own_forward,
    is_bound,
    is_changed,
    kinds_below,
)
from .integrations import ADAPTERS, Options, Plan, loaded
from .integrations.torch_modules import plan_layer_norm
from .parts import PARTS
from .release import give_back, is_released, release
from .settings import SETTINGS
from .watch import observed

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """One module of a report: its name and class, the backend per op when fused, the reason when not."""

    name: str
    module: str
    fused: bool
    ops: dict[str, str]
    reason: str | None = None

    def __str__(self) -> str:
        kernels = ", ".join(f"{op}: {backend}" for op, backend in self.ops.items())
        return f"{self.name or '(model)':<28} {self.module:<18} {kernels if self.fused else f'eager, {self.reason}'}"


class Report(list[Row]):
    """The rows of :func:`report`; prints as a table.

    packed_bytes: memory that packed copies of weights take now (CPU kernels, inference).
    released_bytes: memory that originals took and gave back (``accelerate(..., release_original=True)``).
    """

    packed_bytes: int = 0
    released_bytes: int = 0

    def __str__(self) -> str:
        sizes = {"packed weights": self.packed_bytes, "released originals": self.released_bytes}
        return "\n".join(
            [*map(str, self), *(f"{name}: {size / 2**20:.1f} MiB" for name, size in sizes.items() if size)]
        )


_HOOKED = "a module inside it carries a hook or a forward of its own, which fusion would skip"


def _plan(module: nn.Module, options: Options, parent: nn.Module | None) -> Plan | str | None:
    known = (found for adapter in loaded() if (found := adapter.plan(module, options, parent)) is not None)
    found = next(known, None)
    if found is None and type(module) not in _OWN:
        found = plan_layer_norm(module, options)
    if isinstance(found, Plan) and has_own_forward(module):
        return "its forward was replaced on the instance"
    if isinstance(found, Plan) and found.whole and has_hooks(module):
        return _HOOKED
    return found


def _planned(
    module: nn.Module, options: Options, prefix: str = ""
) -> Iterator[tuple[str, nn.Module, Plan | str | None, bool]]:
    """(name, module, plan, inside): every module once, parents first; ``inside`` marks children of a fused whole.

    Those are planned, too: a hook that is put on one later leaves the others fused one by one.
    """
    stack: list[tuple[str, nn.Module, nn.Module | None, bool]] = [(prefix, module, None, False)]
    seen: set[int] = set()
    while stack:
        name, current, parent, inside = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        found = _plan(current, options, parent)
        yield name, current, found, inside
        within = inside or (isinstance(found, Plan) and found.whole)
        for child_name, child in reversed(list(current.named_children())):
            stack.append((f"{name}.{child_name}" if name else child_name, child, current, within))


def _call(fused: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The fused forward, or the class's own when a child that fusion would skip has a hook or is one it cannot replace.

    Also where somebody kept this function in a wrapper of his own, and the model was restored.
    """
    if MARK not in module.__dict__ or observed() or has_hooks(module):
        return type(module).forward(module, *args, **kwargs)
    if is_changed(module):
        found = None if torch.compiler.is_compiling() else _plan(module, Options(), None)
        if not isinstance(found, Plan):
            return type(module).forward(module, *args, **kwargs)
        _bind(module, found)
        fused = found.forward
    return fused(module, *args, **kwargs)


def _call_part(fused: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The same for a module whose fused forward skips no other."""
    if MARK not in module.__dict__ or observed():
        return type(module).forward(module, *args, **kwargs)
    return fused(module, *args, **kwargs)


# what torch.nn.DataParallel calls to copy a module's dictionary
REPLICATE = "_replicate_for_data_parallel"


def _replica(module: nn.Module) -> nn.Module:
    """A replica of a module for another device, whose forward reads that one's parameters."""
    replica: Any = type(module)._replicate_for_data_parallel(module)
    replica.__dict__.pop(KNOWN, None)
    if is_bound(replica):
        forward = replica.__dict__["forward"]
        replica.__dict__["forward"] = partial(forward.func, *forward.args[:-1], replica)
    return replica


def _bind(module: nn.Module, found: Plan) -> None:
    own = module.__dict__
    own["forward"] = partial(_call if found.whole else _call_part, found.forward, module)
    own[REPLICATE] = partial(_replica, module)
    own[MARK], own[PARTS], own[KINDS] = found.ops, found.parts, kinds_below(module) if found.whole else None


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvit.{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(
    model: Model,
    attention: bool = True,
    layer_norm: bool = True,
    mlp: bool = True,
    patch_embed: bool = True,
    strict: bool = False,
    release_original: bool = False,
) -> Model:
    """Bind fused forwards to the modules of a timm Vision Transformer, in place.

    The model keeps its class, its parameters and its state_dict; it trains, compiles and can be copied.
    Calling it again changes nothing more; :func:`restore` undoes it.

    What is changed in the model later counts: a block whose child is replaced by one without a fused form, or gets a
    hook or a forward of its own, computes as its class does. So does everything while torch.func transforms it or
    torch.fx traces it, and under a TorchDispatchMode or a hook on all modules.

    ``release_original`` is for inference on a CPU by whole blocks and saves memory: of qkv, proj, fc1 and fc2 only the
    copy stays that the kernels read. state_dict (whose values are copies then), load_state_dict and deep copies work as
    before; a pickle holds an accelerated model that is not released. ``.to()`` another dtype or device gives the
    originals back, and so do :func:`restore` and calling this without the option, bit for bit. What would compute with
    an original (gradients, active dropouts, masks, hooks inside a block, another backend, export) raises RuntimeError.
    Whoever holds a weight itself, an optimizer for one, keeps its memory.

    Args:
        model: a timm VisionTransformer, or any module that contains one; a ``fastvit.VisionTransformer`` needs nothing
            but may be released.
        attention, layer_norm, mlp, patch_embed: which parts may be fused; whole blocks need the first three.
        strict: raise when a block, attention, MLP, norm or patch embedding has to stay eager.
        release_original: keep the linear weights of blocks, fp32 / fp16 / bf16, in the CPU kernels' layout alone.

    Returns:
        The model itself.

    Raises:
        TypeError: not a module. ValueError: nothing in it can be fused, or no block of it released. RuntimeError:
            ``strict``, with all reasons.
    """
    _check_model("accelerate", model)
    if SETTINGS.disable:
        return model
    plans = list(_planned(model, Options(attention, layer_norm, mlp, patch_embed)))
    reasons = [
        f"{name or '(model)'}: {found}" for name, _, found, inside in plans if isinstance(found, str) and not inside
    ]
    if strict and reasons:
        raise RuntimeError(f"fastvit.accelerate: strict, but {len(reasons)} modules stay eager: {'; '.join(reasons)}")
    fused = [(module, found) for _, module, found, _ in plans if isinstance(found, Plan)]
    if not fused and not any(type(m).__module__.startswith(__package__ or "fastvit") for m in model.modules()):
        known = ", ".join(ADAPTERS)
        detail = f" ({'; '.join(reasons)})" if reasons else ""
        raise ValueError(
            f"fastvit.accelerate: found no Vision Transformer module of {known} in {type(model).__name__}{detail}"
        )
    if fused:
        restore(model)
    else:
        give_back(model)
    for module, found in fused:
        _bind(module, found)
    if release_original:
        release(model)
    return model


def restore(model: Model) -> Model:
    """Remove what :func:`accelerate` bound; the model then computes bit for bit what it did before.

    Originals that were released are there again, as new parameters.

    Raises:
        TypeError: not a module. RuntimeError: numbers are gone (``quantize(..., release_original=True)``).
    """
    _check_model("restore", model)
    give_back(model)
    for module in model.modules():
        if is_bound(module):
            del module.__dict__["forward"]
        for name in (MARK, PARTS, KINDS, REPLICATE, INT8, KNOWN):
            module.__dict__.pop(name, None)
    prepack.forget(model.parameters())
    return model


@contextmanager
def accelerated(model: Model, **options: bool) -> Iterator[Model]:
    """``with accelerated(model):`` accelerates inside the block and restores the model behind it.

    Takes :func:`accelerate`'s options. A model that was accelerated before is so again behind the block.
    """
    _check_model("accelerated", model)
    bound = ("forward", MARK, PARTS, KINDS, REPLICATE, INT8)
    before = [
        (m, {name: m.__dict__[name] for name in bound if name in m.__dict__})
        for m in model.modules()
        if MARK in m.__dict__
    ]
    released = is_released(model)
    try:
        yield accelerate(model, **options)
    finally:
        restore(model)
        for module, attributes in before:
            module.__dict__.update(attributes)
        if released:
            release(model)


# op -> the arguments of a smallest call for tensors like this one
_PROBES: dict[str, Callable[[torch.Tensor], Any]] = {
    "layer_norm": lambda t: ops.prepare_layer_norm(t.new_empty(0, 16)),
    "group_norm": lambda t: ops.prepare_group_norm(t.new_empty(0, 32, 1), 32),
    "attention": lambda t: ops.prepare_attention_packed(t.new_empty(0, 4, 48), 1),
    "linear": lambda t: ops.prepare_linear(t.new_empty(0, 16), t.new_empty(16, 16)),
    "encoder": lambda t: (t.new_empty(0, 4, 16), [], [], 1, 1.0, "none", str(t.dtype).removeprefix("torch."), []),
    "norm_mlp": lambda t: ops.prepare_norm_mlp(
        t.new_empty(0, 16), None, None, t.new_empty(16, 16), None, t.new_empty(16, 16), None
    ),
    "patch_embed": lambda t: ops.prepare_patch_embed(t.new_empty(0, 1, 4, 4), t.new_empty(16, 1, 4, 4)),
}


def _probe(op: str, like: torch.Tensor) -> str:
    """The backend that runs ``op`` for tensors of this device and dtype."""
    with torch.no_grad():
        return backends.select(op, *_PROBES[op](like.detach()))


def _why_eager(module: nn.Module, found: Plan | str | None) -> str:
    if isinstance(found, str):
        return found
    if isinstance(found, Plan):
        return "not accelerated yet: call fastvit.accelerate(model)"
    if next(module.children(), None) is not None:
        return f"uses {', '.join(name for name, _ in module.named_parameters(recurse=False))} as its class does"
    return f"no fused form of {type(module).__name__} outside a block"


def report(model: nn.Module) -> Report:
    """What each module of a model runs on: fused ops with their backends, or the reason it was left alone.

    Lists every module with parameters of its own and every one an adapter knows; children of a fused block are named as
    part of it. Backends are those in force now, for the parameters' device and dtype.

    Raises:
        TypeError: not a module.
    """
    _check_model("report", model)
    rows, fused = Report(), list[str]()
    rows.packed_bytes = prepack.bytes_of(model.parameters())
    rows.released_bytes = prepack.released_bytes_of(model.parameters())
    for name, module, found, _ in _planned(model, Options()):
        if any(name.startswith(f"{parent}.") for parent in fused):
            continue
        kind, like = type(module).__name__, next(module.parameters(), None)
        used: tuple[str, ...] | None = module.__dict__.get(
            MARK, _OWN.get(type(module), type(module).__dict__.get(MARK))
        )
        if has_own_forward(module):
            used = None
        reason = found if isinstance(found, str) else _HOOKED if has_hooks(module) else None
        if used is not None and like is not None and reason is None:
            chosen = {op: _probe(op, like) for op in used}
            if chosen.get("encoder") == "reference":  # then its ops run one by one
                del chosen["encoder"]
            if chosen:
                rows.append(Row(name, kind, True, chosen))
            if used != ("encoder",):
                fused.append(name)
        elif used is not None:
            rows.append(Row(name, kind, False, {}, reason or "it has no parameters"))
        elif found is not None or next(module.parameters(recurse=False), None) is not None:
            rows.append(Row(name, kind, False, {}, _why_eager(module, found)))
    return rows


# our own modules, which are fused as they are
_OWN: dict[type, tuple[str, ...]] = {
    layers.Block: BLOCK_OPS,
    layers.PatchEmbed: ("patch_embed",),
    layers.LayerNorm: ("layer_norm",),
}
