"""A layout as data: rules between its names and timm's, read in both directions.

timm's names are the hub: every layout is translated into them and out of them. Translation works on meta tensors too,
so that names and shapes are checked before any data is read.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .error import CheckpointError, shape_of

LEAVES = ("weight", "bias", "")


@dataclass(frozen=True)
class Rule:
    """Tensors of timm's and the same numbers elsewhere.

    ``{}`` in a name is the block's number; a name that begins with ^ stands outside the layout's prefix, one that ends
    with _ has its leaf attached without a dot (``in_proj_weight``). Where a side has several tensors their rows are
    joined and dealt out anew by ``timm_shares`` and ``shares`` (equal ones if empty).
    """

    timm: tuple[str, ...]
    other: tuple[str, ...]
    timm_shares: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()
    view: str = ""  # "token": (D,) there is (1, 1, D) here; "table": (N, D) is (1, N, D); "transposed"
    biasless: bool = False  # a projection without bias, to which timm gives a zero one
    needs: str = ""  # on the way out the rule holds only beside this tensor of timm's
    gated: bool | None = None  # on the way out the rule holds for blocks with (without) a gate in the MLP
    wanted_only: bool = False  # on the way out the rule holds only for a model that has such tensors


@dataclass(frozen=True)
class Layout:
    """Where a library keeps what.

    ``markers`` are in every file of the layout, below one common prefix. ``others`` are beginnings of names that belong
    to other parts of a larger model, ``resize`` is how the library resizes positions. With ``passthrough`` every name
    below the prefix that no rule knows is timm's own.
    """

    name: str
    src: str
    markers: tuple[str, ...]
    rules: tuple[Rule, ...]
    resize: str
    others: tuple[str, ...] = ()
    passthrough: bool = False

    def prefixes(self, names: Mapping[str, Tensor]) -> list[str]:
        """The prefixes below which this layout stands in a state_dict."""
        first = self.markers[0]
        found = [name[: len(name) - len(first)] for name in names if name.endswith(first)]
        return [
            prefix
            for prefix in found
            if (not prefix or prefix[-1] == ".") and all(prefix + marker in names for marker in self.markers)
        ]


@dataclass
class Translated:
    """Tensors by their new names, the old names behind each, and the old names that found no place."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def add(self, names: Sequence[str], tensors: Sequence[Tensor], origin: Sequence[str]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            if name in self.tensors:
                raise CheckpointError(f"fastvit: {origin[0]!r} and {self.origin[name][0]!r} are the same weight")
            self.tensors[name], self.origin[name] = tensor, tuple(origin)

    def drop(self, name: str) -> None:
        self.tensors.pop(name, None)
        self.origin.pop(name, None)


def rules(names: Mapping[str, str | tuple[str, ...]], *more: Rule) -> tuple[Rule, ...]:
    """Rules from a table of timm's names and the others' (several: rows joined), and some that are not so simple."""
    simple = (Rule((ours,), (other,) if isinstance(other, str) else other) for ours, other in names.items())
    return (*simple, *more)


def to_timm(state: Mapping[str, Tensor], layout: Layout, prefix: str) -> Translated:
    """A state_dict of this layout under timm's names.

    Raises:
        CheckpointError: a part of a packed tensor is missing, or parts do not fit each other.
    """
    found, left = Translated(), dict(state)
    for rule, ours, others in _instances(layout, state, prefix, incoming=True):
        missing = [name for name in others if name not in left]
        if missing:
            raise CheckpointError(f"fastvit: {missing[0]!r} is missing beside {next(n for n in others if n in left)!r}")
        parts = [_view(left.pop(name), rule.view, name, incoming=True) for name in others]
        found.add(ours, _regroup(others, parts, rule.shares, rule.timm_shares, len(ours)), others)
        if rule.biasless and ours[0].endswith(".weight"):
            bias = ours[0].removesuffix("weight") + "bias"
            found.add([bias], [parts[0].new_zeros(parts[0].shape[0])], others)
    for name in left:
        if name.startswith(layout.others) or name.endswith("position_ids"):
            continue
        if layout.passthrough and name.startswith(prefix):
            found.add([name.removeprefix(prefix)], [left[name]], [name])
        else:
            found.left.append(name)
    _fold_class_position(found)
    return found


def from_timm(
    state: Mapping[str, Tensor], layout: Layout, prefix: str, wanted: Mapping[str, Tensor] | None = None
) -> Translated:
    """timm's names as this layout's; ``wanted`` chooses where the layout has two names for one tensor.

    Raises:
        CheckpointError: the layout has no place for a bias that is not zero, or parts do not fit each other.
    """
    found, left = Translated(), dict(state)
    _unfold_class_position(left, layout, wanted)
    for rule, ours, others in _instances(layout, state, prefix, incoming=False):
        if not _holds(rule, layout, others, state, wanted) or any(name not in left for name in ours):
            continue
        parts = [left.pop(name) for name in ours]
        dealt = _regroup(ours, parts, rule.timm_shares, rule.shares, len(others))
        bias = [ours[0].removesuffix("weight") + "bias"] if rule.biasless else []
        dropped = [left.pop(name) for name in bias if name in left]
        views = [_view(part, rule.view, ours[0], incoming=False) for part in dealt]
        found.add(others, views, [*ours, *(bias if dropped else ())])
        if any(not t.is_meta and t.count_nonzero() for t in dropped):
            raise CheckpointError(f"fastvit: the bias beside {ours[0]!r} is not zero, and {layout.name} has none")
    for name in left:
        if layout.passthrough and (name != "mask_token" or prefix + name in (wanted or ())):
            found.add([prefix + name], [left[name]], [name])
        elif name != "mask_token":
            found.left.append(name)
    return found


def _holds(
    rule: Rule, layout: Layout, others: Sequence[str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor] | None
) -> bool:
    if wanted is not None and any(name in wanted for name in others):
        return True
    if rule.wanted_only or layout.passthrough or (rule.needs and rule.needs not in state):
        return False
    hidden, out = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    gated = hidden is not None and out is not None and hidden.dim() == 2 and hidden.shape[0] == 2 * out.shape[-1]
    return rule.gated is None or rule.gated == gated


def _spell(name: str, prefix: str, block: int, leaf: str) -> str:
    name = name[1:] if name.startswith("^") else prefix + name
    name = name.replace("{}", str(block))
    return name + leaf if name.endswith("_") or not leaf else f"{name}.{leaf}"


def _instances(
    layout: Layout, names: Mapping[str, Tensor], prefix: str, incoming: bool
) -> Iterator[tuple[Rule, list[str], list[str]]]:
    """Each rule with its names on both sides, for every block and leaf of which one side has something."""
    for rule in layout.rules:
        block, known = 0, True
        while known and (block == 0 or "{}" in rule.timm[0]):
            known = False
            for leaf in LEAVES:
                ours = [_spell(name, "", block, leaf) for name in rule.timm]
                others = [_spell(name, prefix, block, leaf) for name in rule.other]
                if any(name in names for name in (others if incoming else ours)):
                    known = True
                    yield rule, ours, others
            block += 1


def _view(tensor: Tensor, view: str, name: str, incoming: bool) -> Tensor:
    ranks = {"transposed": (2, 2), "token": (1, 3), "table": (2, 3)}
    if not view:
        return tensor
    rank = ranks[view][0 if incoming else 1]
    if tensor.dim() != rank:
        raise CheckpointError(f"fastvit: {name!r} must have {rank} dimensions, got shape {shape_of(tensor)}")
    if view == "transposed":
        return tensor.t()
    if view == "token":
        return tensor.reshape(1, 1, -1) if incoming else tensor.reshape(-1)
    return tensor.unsqueeze(0) if incoming else tensor.flatten(0, 1)


def _regroup(
    names: Sequence[str], parts: Sequence[Tensor], had: Sequence[int], wanted: Sequence[int], count: int
) -> Sequence[Tensor]:
    """Rows in shares ``had`` as ``count`` tensors in shares ``wanted``."""
    if len(parts) == count == 1:
        return parts
    had, wanted = had or (1,) * len(parts), wanted or (1,) * count
    first = parts[0]
    unit = first.shape[0] // had[0] if first.dim() else 0
    fits = [(unit * share, *first.shape[1:]) for share in had] == [shape_of(part) for part in parts]
    if not fits or unit * sum(had) % sum(wanted):
        shapes = ", ".join(f"{name!r} {shape_of(part)}" for name, part in zip(names, parts, strict=True))
        raise CheckpointError(f"fastvit: {shapes} cannot be dealt out by rows as {count} tensors")
    return joined(parts).split([unit * sum(had) // sum(wanted) * share for share in wanted])


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors one behind the other; of meta tensors the shape, for which torch.cat would import torch's compiler."""
    if len(parts) == 1 or not any(part.is_meta for part in parts):
        return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.empty(shape, dtype=dtype, device="meta")


def added(token: Tensor, rows: Tensor) -> Tensor:
    """A token with its position added; of meta tensors the shape, for the reason of :func:`joined`."""
    if not (token.is_meta or rows.is_meta):
        return token + rows
    shape = torch.broadcast_shapes(token.shape, rows.shape)
    return torch.empty(shape, dtype=torch.promote_types(token.dtype, rows.dtype), device="meta")


def _fold_class_position(found: Translated) -> None:
    """DINOv2 with registers gives a position to its class token; timm has that in the token itself."""
    tensors, origin = found.tensors, found.origin
    if "register_tokens" in "".join(origin.get("reg_token", ())) and {"cls_token", "pos_embed"} <= tensors.keys():
        token, table = tensors["cls_token"], tensors["pos_embed"]
        if token.dim() == table.dim() == 3 and token.shape[-1] == table.shape[-1] and table.shape[1]:
            tensors["cls_token"], tensors["pos_embed"] = added(token, table[:, :1]), table[:, 1:]
            origin["cls_token"] += origin["pos_embed"]


def _unfold_class_position(state: dict[str, Tensor], layout: Layout, wanted: Mapping[str, Tensor] | None) -> None:
    named = any("register_tokens" in name for rule in layout.rules for name in rule.other)
    if layout.passthrough:
        named = any(name.endswith("register_tokens") for name in wanted or ())
    if named and "reg_token" in state and "pos_embed" in state:
        table = state["pos_embed"]
        state["pos_embed"] = joined([table.new_zeros(1, 1, table.shape[-1]), table], 1)
