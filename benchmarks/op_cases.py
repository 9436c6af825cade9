"""Op-level cases as data: an op at a model's shape, and the work it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import cases, work

OPS = (
    "attention",
    "layer_norm",
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "norm_mlp",
    "patch_embed",
)
GROUPS = {"linear": tuple(op for op in OPS if op.startswith("linear"))}
DIRECTIONS = ("forward", "backward", "forward+backward")

GPU_MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
GPU_BATCHES = (1, 64, 256)
GPU_TOKENS, GPU_TOKENS_BATCH = (50, 257, 577, 1025), 64  # of attention beside the model's own, at no larger a batch
GPU_DTYPES = ("bfloat16",)
CPU_MODELS, CPU_BATCHES, CPU_DTYPES = ("vit_base_patch16_224",), (1, 8), ("float32",)
DEFAULT_DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class OpCase:
    """One op at one shape.

    op: a name of `OPS`. batch B, tokens N with prefix tokens, width D, heads H, hidden F; an image is side x side with
    patch x patch patches of channels. dtype and direction by name.
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
    def shape(self) -> str:
        """As it stands in a row: attention BxHxNxE, layer_norm BxNxD, linear BxNxINxOUT, norm_mlp BxNxDxF, patch_embed
        BxCxHEIGHTxWIDTHxPxD.
        """
        numbers: tuple[int, ...] = (self.batch, self.tokens, self.width)
        if self.op == "attention":
            numbers = (self.batch, self.heads, self.tokens, self.head_dim)
        elif self.op in GROUPS["linear"]:
            numbers = (self.batch, self.tokens, *self.features)
        elif self.op == "norm_mlp":
            numbers = (*numbers, self.hidden)
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
        if self.op == "norm_mlp":
            return work.norm_mlp(rows, self.width, self.hidden, keep)
        if self.op == "patch_embed":
            return work.patch_embed(*self._patches())
        residual = self.op in ("linear_proj", "linear_fc2")
        return work.linear(rows, *self.features, self.op == "linear_fc1", residual, keep)

    def _backward(self) -> work.Work:
        rows = self.batch * self.tokens
        if self.op == "attention":
            return work.attention_backward(self.batch, self.heads, self.tokens, self.tokens, self.head_dim)
        if self.op == "layer_norm":
            return work.layer_norm_backward(rows, self.width)
        if self.op == "norm_mlp":
            return work.norm_mlp_backward(rows, self.width, self.hidden)
        if self.op == "patch_embed":
            return work.patch_embed_backward(*self._patches())
        return work.linear_backward(rows, *self.features, self.op == "linear_fc1")

    def _patches(self) -> tuple[int, int, int, int, int]:
        patches = (self.side // self.patch) ** 2
        return self.batch, patches, self.channels * self.patch**2, self.width, self.prefix


def at_model(op: str, model: str, batch: int, dtype: str, direction: str, tokens: int | None = None) -> OpCase:
    """An op as a preset calls it, or with another number of tokens.

    Raises:
        ValueError: no such preset, or one whose image is not square.
    """
    import fastvit.config

    config = fastvit.config.preset(model)
    height, width = cases.pair(config.img_size)
    patch, patch_width = cases.pair(config.patch_size)
    if height != width or patch != patch_width:
        raise ValueError(f"bench-ops: {model} has no square images and patches")
    own = cases.tokens(config)
    return OpCase(
        op, batch, own if tokens is None else tokens, config.embed_dim, config.num_heads, config.hidden_dim,
        dtype, direction, height, patch, config.in_chans, config.prefix_tokens,
    )  # fmt: skip


def expand(ops: Sequence[str]) -> tuple[str, ...]:
    """Names of ops, groups such as "linear" replaced by their members."""
    return tuple(dict.fromkeys(name for op in ops for name in GROUPS.get(op, (op,))))


def grid(
    gpu: bool,
    ops: Sequence[str] = (),
    models: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    directions: Sequence[str] = (),
    tokens: Sequence[int] = (),
) -> list[OpCase]:
    """Every combination; what is left empty gets the defaults of a GPU or of a CPU.

    Unless tokens are given, attention on a GPU is also measured at `GPU_TOKENS`. patch_embed has its image's tokens.
    """
    names = expand(ops) or OPS
    models = models or (GPU_MODELS if gpu else CPU_MODELS)
    batches = batches or (GPU_BATCHES if gpu else CPU_BATCHES)
    dtypes = dtypes or (GPU_DTYPES if gpu else CPU_DTYPES)
    found = []
    for model in models:
        for dtype in dtypes:
            for direction in directions or DEFAULT_DIRECTIONS:
                for op in names:
                    for batch in batches:
                        for count in (None,) if op == "patch_embed" else tokens or (None,):
                            found.append(at_model(op, model, batch, dtype, direction, count))
                    if op == "attention" and gpu and not tokens:
                        most = min(max(batches), GPU_TOKENS_BATCH)
                        found += [at_model(op, model, most, dtype, direction, count) for count in GPU_TOKENS]
    return list(dict.fromkeys(found))
