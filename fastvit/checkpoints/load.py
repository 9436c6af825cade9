"""Weights of a file into a model: checked by headers, read, translated, resized, and only then copied."""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from ..resample import WAYS
from .convert import SOURCES, recognise, translate, unwrapped
from .error import CheckpointError, shape_of, shortened
from .files import open_checkpoint
from .layout import Translated, from_timm, to_timm
from .positions import fit_positions

Model = TypeVar("Model", bound=nn.Module)
HEADS = ("head.", "head_dist.", "pre_logits.")
FOREIGN_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "heads.", "pooler.")


@dataclass(frozen=True)
class Options:
    """How a checkpoint may differ from a model."""

    src: str = "auto"
    strict: bool = True
    interpolation: str = "auto"
    source_grid: tuple[int, int] | None = None
    drop_head: bool = False


def load_checkpoint(
    model: Model,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    weights_only: bool | None = None,
    interpolation: str = "auto",
    source_grid: tuple[int, int] | None = None,
    drop_head: bool = False,
    src: str = "auto",
) -> Model:
    """Load a checkpoint of any known layout into a Vision Transformer of fastvit, timm, transformers or torchvision.

    Args:
        model: takes the weights in place; its class says which names and shapes it wants.
        path: ``.safetensors``, ``.npz`` of the original, a directory of ``save_pretrained`` (shards included), or
            with ``weights_only=True`` a ``.pt``, ``.pth`` or ``.bin`` of which nothing but tensors is read.
        strict: every tensor of the model is in the file and the other way round. False warns about the rest; tensors
            that are in both must still be of one shape.
        interpolation: of position tables of another grid: "auto", as the library does that the file comes from, or by
            name: "timm" (bicubic, antialiased), "transformers" (bicubic), "torchvision" (bicubic, corners aligned),
            "dinov2" (bicubic, the scale from sizes + 0.1), "npz" (bilinear, timm's choice for the original's files),
            "original" (bilinear, corners aligned, as google-research/vision_transformer does; paper, section 3.2).
        source_grid: (height, width) in patches of the file's position table, where it is not a square.
        drop_head: keep the model's own head, and leave the file's out, where the two differ (in number of classes, or
            because one has none).
        src: the layout as in :func:`fastvit.convert_state_dict`, if it shall not be recognised.

    Returns:
        The model. Weights take the dtype and device of its parameters. Activation and eps are the model's own.

    Raises:
        CheckpointError (a ValueError): a file that is damaged, tries to run code or claims absurd sizes; an unknown
            layout; names or shapes that do not fit, with a list. The model is then as it was, to the bit.
        FileNotFoundError: no such file. TypeError, ValueError: an argument that is none of the above.
    """
    options = _checked(model, src, strict, interpolation, source_grid, drop_head)
    source = open_checkpoint(path, weights_only)
    bare = _bare(model)
    wanted = {name: tensor for name, tensor in bare.state_dict().items() if isinstance(tensor, Tensor)}
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError("fastvit.load_checkpoint: model is on the meta device and has no memory; use model.to_empty()")
    try:
        headers = source.headers()
        plan = _fitted(headers, wanted, bare, options)
        _complain(plan, wanted, type(bare).__name__, strict)
        # what is not used stays a header, so that the second translation takes the same ways as the first
        done = _fitted({**headers, **source.read(sorted(plan.used))}, wanted, bare, options)
    except CheckpointError as error:
        reason = str(error).removeprefix("fastvit: ")
        raise CheckpointError(f"fastvit.load_checkpoint: {source.path}: {reason}") from error
    bare.load_state_dict(done.tensors, strict=False)
    return model


@dataclass(frozen=True)
class Fitted:
    """Tensors under the model's names, the file's tensors that they were made of, and what did not fit."""

    tensors: Mapping[str, Tensor]
    used: frozenset[str]
    unexpected: list[str]
    kept: frozenset[str]  # of the model, which stay as they are


def _bare(model: nn.Module) -> nn.Module:
    """Without the wrappers of DistributedDataParallel and torch.compile."""
    for name in ("module", "_orig_mod"):
        children = dict(model.named_children())
        if list(children) == [name]:
            return _bare(children[name])
    return model


def _checked(
    model: nn.Module,
    src: str,
    strict: bool,
    interpolation: str,
    source_grid: tuple[int, int] | None,
    drop_head: bool,
) -> Options:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvit.load_checkpoint: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, valid in (("src", src, SOURCES), ("interpolation", interpolation, ("auto", *WAYS))):
        if value not in valid:
            raise ValueError(f"fastvit.load_checkpoint: {name} must be one of {valid}, got {value!r}")
    if source_grid is not None:
        sides = tuple(source_grid) if isinstance(source_grid, (tuple, list)) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"fastvit.load_checkpoint: source_grid must be (height, width), got {source_grid!r}")
        source_grid = sides
    return Options(src, strict, interpolation, source_grid, drop_head)


def _fitted(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: nn.Module, options: Options) -> Fitted:
    """The state of a file as the model wants it; on meta tensors as on real ones."""
    same = {name: shape_of(t) for name, t in state.items()} == {name: shape_of(t) for name, t in wanted.items()}
    if same and options.src == "auto" and options.source_grid is None and not _may_be_square(wanted, model):
        return Fitted(dict(state), frozenset(state), [], frozenset())
    short = unwrapped(state)
    full = dict(zip(short, state, strict=True))
    found, way, _ = translate(short, options.src)
    layout, prefix = recognise(wanted)
    goal = to_timm({name: tensor.to("meta") for name, tensor in wanted.items()}, layout, prefix)
    kept = {name for name in goal.origin.get("mask_token", ()) if "mask_token" not in found.tensors}
    if options.drop_head:
        kept |= _without_head(found, goal)
    way = way if options.interpolation == "auto" else options.interpolation
    fit_positions(found, goal.tensors, grid_of(model, prefix), way, options.source_grid)
    done = from_timm(found.tensors, layout, prefix, wanted)
    ours = {name: tensor for name, tensor in done.tensors.items() if name in wanted}
    used = {full[name] for made in ours for hub in done.origin[made] for name in found.origin[hub]}
    strangers = [*done.left, *(hub for made, origin in done.origin.items() if made not in ours for hub in origin)]
    unexpected = [name for hub in strangers for name in found.origin[hub]] + found.left
    return Fitted(ours, frozenset(used), [full[name] for name in dict.fromkeys(unexpected)], frozenset(kept))


def _may_be_square(wanted: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether as many patches as the model has make a square that the model has not."""
    try:
        grid = grid_of(model, recognise(wanted)[1])
    except CheckpointError:  # a model of any kind, whose own file this is
        return False
    return grid is not None and grid[0] != grid[1] and math.isqrt(grid[0] * grid[1]) ** 2 == grid[0] * grid[1]


def _without_head(found: Translated, goal: Translated) -> set[str]:
    """Take the head out of ``found`` if it is not the model's; the names under which the model keeps its own."""
    heads = [{k: shape_of(t) for k, t in side.tensors.items() if k.startswith(HEADS)} for side in (found, goal)]
    foreign = [name for name in goal.left if name.startswith(FOREIGN_HEADS)]
    found.left = [name for name in found.left if not name.startswith((*HEADS, *FOREIGN_HEADS))]
    if heads[0] == heads[1]:
        return set(foreign)
    for name in heads[0]:
        found.drop(name)
    return {name for hub in heads[1] for name in goal.origin[hub]} | set(foreign)


def _complain(plan: Fitted, wanted: Mapping[str, Tensor], model: str, strict: bool) -> None:
    """Raise what keeps a file and a model apart, or warn of what may."""
    shapes, missing = [], [name for name in wanted if name not in plan.tensors and name not in plan.kept]
    for name, tensor in plan.tensors.items():
        if shape_of(tensor) != shape_of(wanted[name]):
            shapes.append(f"{name} {shape_of(tensor)} instead of {shape_of(wanted[name])}")
        elif tensor.is_floating_point() != wanted[name].is_floating_point():
            shapes.append(f"{name} {tensor.dtype} instead of {wanted[name].dtype}")
    reasons = [
        f"{len(names)} {what}: {shortened(names)}"
        for what, names in (("missing", missing), ("unexpected", plan.unexpected), ("of another shape or kind", shapes))
        if names
    ]
    if not plan.tensors or shapes or (strict and reasons):
        head = any(name.startswith((*HEADS, *FOREIGN_HEADS)) for name in (*missing, *plan.unexpected, *shapes))
        hint = "; drop_head=True keeps the model's own head" if head else ""
        raise CheckpointError(f"fastvit: does not fit {model}: {'; '.join(reasons) or 'nothing in common'}{hint}")
    if reasons:
        warnings.warn(f"fastvit.load_checkpoint: {'; '.join(reasons)}", stacklevel=3)


def grid_of(model: nn.Module, prefix: str) -> tuple[int, int] | None:
    """Patches along height and width of the images a model is built for, None if it does not say."""
    base = model.get_submodule(prefix.rstrip("."))
    embed: Any = getattr(base, "patch_embed", None)
    if hasattr(embed, "grid_size"):
        return int(embed.grid_size[0]), int(embed.grid_size[1])
    embeddings = getattr(base, "embeddings", base)
    embed = getattr(embeddings, "patch_embeddings", embeddings)
    sizes: list[Any] = [getattr(embed, name, None) for name in ("image_size", "patch_size")]
    if not all(isinstance(size, (int, tuple, list)) for size in sizes):
        return None
    (height, width), (p, q) = ((size, size) if isinstance(size, int) else tuple(size) for size in sizes)
    return height // p, width // q
