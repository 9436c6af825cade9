"""Op-level cases as data: an op at a model's shape, and the work it holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import cases, work

OPS = (
    "attention",
    "layer_norm",
    "group_norm",
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "norm_mlp",
    "patch_embed",
    "block",
)
GROUPS = {"linear": tuple(op for op in OPS if op.startswith("linear"))}
DIRECTIONS = ("forward", "backward", "forward+backward")


GPU_MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
GPU_BATCHES = (1, 64, 256)
GPU_TOKENS, GPU_TOKENS_BATCH = (50, 257, 577, 1025), 64
GPU_DTYPES = ("bfloat16",)
CPU_MODELS, CPU_BATCHES, CPU_DTYPES = ("vit_base_patch16_224",), (1, 8), ("float32",)
CPU_TOKENS = (50, 577, 1025)
DEFAULT_DIRECTIONS = ("forward", "forward+backward")
# Beside Base's 768 the narrowest of the family, and the widest; each is measured at Base's number of tokens.
WIDTHS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224", "vit_gigantic_patch14_224")
# Channels and groups of the first norm of a hybrid's ResNet stem ("An Image is Worth 16x16 Words", section 3.1).
STEM, STEM_GROUPS = 64, 32
MAIN = ("attention", "layer_norm", "linear_fc1", "norm_mlp", "block")


@dataclass(frozen=True)
class Grid:
    """Every combination of its values; an empty tokens is each model's own.

    varies: the field a grid is there to vary; once somebody fixes that field, the grid adds nothing and is left out.
    most: no batch is larger, whatever was asked for.
    """

    ops: tuple[str, ...] = OPS
    models: tuple[str, ...] = CPU_MODELS
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = CPU_DTYPES
    directions: tuple[str, ...] = ("forward",)
    tokens: tuple[int, ...] = ()
    varies: str = ""
    most: int | None = None


CPU_GRIDS = (
    Grid(batches=CPU_BATCHES, directions=DEFAULT_DIRECTIONS),
    Grid(MAIN, tokens=CPU_TOKENS, varies="tokens", most=1),
    Grid(("attention", "layer_norm", "linear_fc1", "norm_mlp"), WIDTHS, tokens=(197,), varies="models", most=1),
    Grid(MAIN, batches=CPU_BATCHES, dtypes=("bfloat16",), varies="dtypes"),
)
GPU_GRIDS = (
    Grid(models=GPU_MODELS, batches=GPU_BATCHES, dtypes=GPU_DTYPES, directions=DEFAULT_DIRECTIONS),
    Grid(
        ("attention",), GPU_MODELS, (GPU_TOKENS_BATCH,), GPU_DTYPES, DEFAULT_DIRECTIONS, GPU_TOKENS,
        varies="tokens", most=GPU_TOKENS_BATCH,
    ),
    Grid(MAIN, WIDTHS, (GPU_TOKENS_BATCH,), GPU_DTYPES, tokens=(197,), varies="models", most=GPU_TOKENS_BATCH),
)  # fmt: skip


@dataclass(frozen=True)
class OpCase:
    """One op at one shape.

    op: a name of `OPS`. batch B, tokens N with prefix tokens, width D, heads H, hidden F; an image is side x side with
    patch x patch patches of channels. A hybrid's first GroupNorm has STEM channels of half of the image's side. dtype
    and direction by name.
    """

    op: str
    batch: int
    tokens: int
    width: int
    heads: int
    hidden: int
    dtype: str = "float32"
    direction: str = "forward"
    side: int = 224
    patch: int = 16
    channels: int = 3
    prefix: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return cases.DTYPES[self.dtype]

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def features(self) -> tuple[int, int]:
        """A linear layer's (in, out)."""
        D, F = self.width, self.hidden
        return {"linear_qkv": (D, 3 * D), "linear_proj": (D, D), "linear_fc1": (D, F), "linear_fc2": (F, D)}[self.op]

    @property
    def maps(self) -> tuple[int, int, int, int]:
        """What the stem's first convolution leaves, (B, C, height, width)."""
        return self.batch, STEM, self.side // 2, self.side // 2

    @property
    def shape(self) -> str:
        """As it stands in a row: attention BxHxNxE, layer_norm BxNxD, group_norm BxCxHEIGHTxWIDTH, linear BxNxINxOUT,
        norm_mlp BxNxDxF, block BxNxDxHxF, patch_embed BxCxHEIGHTxWIDTHxPxD.
        """
        numbers: tuple[int, ...] = (self.batch, self.tokens, self.width)
        if self.op == "attention":
            numbers = (self.batch, self.heads, self.tokens, self.head_dim)
        elif self.op in GROUPS["linear"]:
            numbers = (self.batch, self.tokens, *self.features)
        elif self.op == "norm_mlp":
            numbers = (*numbers, self.hidden)
        elif self.op == "block":
            numbers = (*numbers, self.heads, self.hidden)
        elif self.op == "group_norm":
            numbers = self.maps
        elif self.op == "patch_embed":
            numbers = (self.batch, self.channels, self.side, self.side, self.patch, self.width)
        return "x".join(map(str, numbers))

    @property
    def work(self) -> work.Work:
        """The least work of the case's direction; a forward alone keeps nothing."""
        if self.direction == "forward":
            return self._forward(keep=False)
        return self._backward() if self.direction == "backward" else self._forward(keep=True) + self._backward()

    def _forward(self, keep: bool) -> work.Work:
        rows = self.batch * self.tokens
        if self.op == "attention":
            return work.attention(self.batch, self.heads, self.tokens, self.tokens, self.head_dim, keep)
        if self.op == "layer_norm":
            return work.layer_norm(rows, self.width, keep=keep)
        if self.op == "group_norm":
            return work.group_norm(self.batch, STEM, (self.side // 2) ** 2, STEM_GROUPS, keep)
        if self.op == "norm_mlp":
            return work.norm_mlp(rows, self.width, self.hidden, keep)
        if self.op == "patch_embed":
            return work.patch_embed(*self._patches())
        if self.op == "block":
            return work.block(self.batch, self.heads, self.tokens, self.head_dim, self.hidden, keep)
        residual = self.op in ("linear_proj", "linear_fc2")
        return work.linear(rows, *self.features, self.op == "linear_fc1", residual, keep)

    def _backward(self) -> work.Work:
        rows = self.batch * self.tokens
        if self.op == "attention":
            return work.attention_backward(self.batch, self.heads, self.tokens, self.tokens, self.head_dim)
        if self.op == "layer_norm":
            return work.layer_norm_backward(rows, self.width)
        if self.op == "group_norm":
            return work.group_norm_backward(self.batch, STEM, (self.side // 2) ** 2, STEM_GROUPS)
        if self.op == "norm_mlp":
            return work.norm_mlp_backward(rows, self.width, self.hidden)
        if self.op == "patch_embed":
            return work.patch_embed_backward(*self._patches())
        if self.op == "block":
            return work.block_backward(self.batch, self.heads, self.tokens, self.head_dim, self.hidden)
        return work.linear_backward(rows, *self.features, self.op == "linear_fc1")

    def _patches(self) -> tuple[int, int, int, int, int]:
        patches = (self.side // self.patch) ** 2
        return self.batch, patches, self.channels * self.patch**2, self.width, self.prefix


def at_model(op: str, model: str, batch: int, dtype: str, direction: str, tokens: int | None = None) -> OpCase:
    """An op as a preset calls it, or with another number of tokens, which for patch_embed are those of another image.

    Raises:
        ValueError: no such preset, one whose image is not square, or no square image has that many patches.
    """
    import fastvit.config

    config = fastvit.config.preset(model)
    side, width = cases.pair(config.img_size)
    patch, patch_width = cases.pair(config.patch_size)
    if side != width or patch != patch_width:
        raise ValueError(f"bench-ops: {model} has no square images and patches")
    tokens = cases.tokens(config) if tokens is None else tokens
    if op in ("patch_embed", "group_norm"):
        side = patch * _root(tokens - config.prefix_tokens)
    return OpCase(
        op, batch, tokens, config.embed_dim, config.num_heads, config.hidden_dim,
        dtype, direction, side, patch, config.in_chans, config.prefix_tokens,
    )  # fmt: skip


def _root(patches: int) -> int:
    root = math.isqrt(max(patches, 0))
    if root == 0 or root**2 != patches:
        raise ValueError(f"no square image has {patches} patches")
    return root


def expand(ops: Sequence[str]) -> tuple[str, ...]:
    """Names of ops, groups such as "linear" replaced by their members."""
    return tuple(dict.fromkeys(name for op in ops for name in GROUPS.get(op, (op,))))


def product(one: Grid) -> list[OpCase]:
    """The cases of one grid.

    Raises:
        ValueError: as `at_model`.
    """
    return list(dict.fromkeys(at_model(*arguments) for arguments in _combinations(one)))


def grid(
    gpu: bool,
    ops: Sequence[str] = (),
    models: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    directions: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> tuple[list[OpCase], dict[str, str]]:
    """The cases of a GPU's grids or of a CPU's and, for those that cannot be, the reason.

    ops narrow every grid. What else is given takes the place of every grid's own values, and leaves out the grids that
    are there to vary it.

    Raises:
        ValueError: there is no case at all; the message says why.
    """
    given = {"models": models, "batches": batches, "dtypes": dtypes, "directions": directions, "tokens": tokens}
    changes: dict[str, Any] = {field: tuple(values) for field, values in given.items() if values}
    wanted = expand(ops) or OPS
    found: dict[OpCase, None] = {}
    left_out: dict[str, str] = {}
    for one in GPU_GRIDS if gpu else CPU_GRIDS:
        if one.varies in changes:
            continue
        narrowed = tuple(op for op in wanted if op in one.ops)
        for arguments in _combinations(dataclasses.replace(one, ops=narrowed, **changes)):
            try:
                found[at_model(*arguments)] = None
            except ValueError as error:
                op, model, *_, count = arguments
                left_out[f"{op} of {model} at {count} tokens"] = str(error)
    if not found:
        raise ValueError("; ".join(dict.fromkeys(left_out.values())))
    return list(found), left_out


def _combinations(one: Grid) -> Iterator[tuple[str, str, int, str, str, int | None]]:
    batches = dict.fromkeys(min(batch, one.most or batch) for batch in one.batches)
    counts: tuple[int | None, ...] = one.tokens or (None,)
    for model, dtype, direction, op in itertools.product(one.models, one.dtypes, one.directions, one.ops):
        for batch, count in itertools.product(batches, counts):
            yield op, model, batch, dtype, direction, count
