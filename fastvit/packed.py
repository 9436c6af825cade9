"""Images of different sizes in one pass: their tokens one after the other in one row, without padding.

Whatever is computed token by token runs on the rows (total, D); attention keeps to each image by cu_seqlens. Images of
one size are embedded as one batch and lie side by side, so that attention takes them as one, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .fused import active, add_branch, add_mlp, encoded, fused_blocks, has_hooks, heads, is_mixed, normed, projected
from .layers import PatchEmbed, pool
from .parts import AttentionParts, parts_of

# the encoder's kernel reads all weights in each call: below this many tokens that costs more than it saves
ROWS_OF_A_CALL = 96


class Batch(NamedTuple):
    """Images of one size: their places in the caller's list, and their tokens (n, N, D)."""

    places: list[int]
    tokens: Tensor


class _DropPerImage(nn.Module):
    """Stochastic depth on rows: one draw for each image, in the order of the caller's list."""

    def __init__(self, drop_prob: float, row: "Row") -> None:
        super().__init__()
        self.drop_prob, self.row = drop_prob, row

    def forward(self, y: Tensor) -> Tensor:
        keep = 1.0 - self.drop_prob
        factors = y.new_empty(len(self.row.lengths), 1).bernoulli_(keep).div_(keep)
        return y * factors[self.row.image]


@dataclass(frozen=True, eq=False)
class Row:
    """How a row of tokens (total, D) is divided: what blocks compute with instead of a batch dimension.

    lengths: tokens of each image, in the row's order. places: which of the caller's images that is.
    """

    lengths: list[int]
    places: list[int]
    device: torch.device

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """As :func:`fastvit.ops.attention_varlen` takes it."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def image(self) -> Tensor:
        """The place of each token's image in the caller's list, (total,)."""
        return torch.tensor(self.places).repeat_interleave(torch.tensor(self.lengths)).to(self.device)

    def dropped(self, drop_path: nn.Module) -> nn.Module:
        """A block's drop path for rows."""
        return _DropPerImage(drop_path.drop_prob, self) if active(drop_path) else drop_path  # type: ignore[arg-type]

    def attend(self, parts: AttentionParts, qkv: Tensor) -> Tensor:
        """What an attention module computes between its projections, (total, 3·H·E) to (total, H·E)."""
        if parts.relative_keys is not None:
            raise ValueError("fastvit: relative positions are for images of one size, not for rows of several")
        norms = {"q_norm": parts.q_norm, "k_norm": parts.k_norm}
        if is_mixed(qkv, parts.q_norm) or is_mixed(qkv, parts.k_norm):
            qkv = torch.stack(heads(parts, qkv[None])).permute(1, 3, 0, 2, 4).flatten(2)[0]
            norms = {}
        options: dict[str, Any] = {"scale": parts.scale, "dropout": parts.dropout, **norms}
        return ops.attention_varlen(qkv, self.cu_seqlens, max(self.lengths), parts.num_heads, **options)

    def block(self, block: Any, x: Tensor) -> Tensor:
        """A pre-norm block on rows, its children called one by one where one of them carries a hook."""
        if has_hooks(block):
            x = x + self.dropped(block.drop_path1)(block.ls1(block.attn(block.norm1(x), row=self)))
            return x + self.dropped(block.drop_path2)(block.ls2(block.mlp(block.norm2(x))))
        parts = parts_of(block)
        parts = parts._replace(drop_path1=self.dropped(parts.drop_path1), drop_path2=self.dropped(parts.drop_path2))
        attention = parts.attention
        h = self.attend(attention, projected(attention, normed(x, parts.norm1)))
        x = add_branch(x, h, attention.proj, attention.proj_drop, parts.layer_scale1, parts.drop_path1)
        return add_mlp(x, parts)


def packed_features(model: Any, images: Sequence[Tensor]) -> list[Batch]:
    """Tokens of all images after the last block and ``norm``, those of one size together.

    See :meth:`fastvit.VisionTransformer.forward_packed_features`.
    """
    batches = [
        Batch(places, model._embed(torch.stack(batch), any_size=True)) for places, batch in _sorted(model, images)
    ]
    shapes = [(len(batch.places), *batch.tokens.shape[1:]) for batch in batches]
    if len({tokens for _, tokens, _ in shapes}) == 1:
        x = batches[0].tokens if len(batches) == 1 else torch.cat([batch.tokens for batch in batches])
        x = _through(model, x)
        parts = list(x.split([n for n, _, _ in shapes]))
    elif (alone := _each_encoded(model, batches)) is not None:
        parts = alone
    else:
        x = torch.cat([batch.tokens.flatten(0, 1) for batch in batches])
        lengths = [tokens for n, tokens, _ in shapes for _ in range(n)]
        x = _through(model, x, Row(lengths, [place for batch in batches for place in batch.places], x.device))
        parts = list(x.split([n * tokens for n, tokens, _ in shapes]))
    return [Batch(b.places, part.view(shape)) for b, part, shape in zip(batches, parts, shapes, strict=True)]


def _each_encoded(model: Any, batches: list[Batch]) -> list[Tensor] | None:
    """The batches one after the other where one kernel runs all blocks at inference and each has rows enough for it."""
    rows = sum(batch.tokens.shape[0] * batch.tokens.shape[1] for batch in batches)
    if torch.is_grad_enabled() or rows < ROWS_OF_A_CALL * len(batches):
        return None
    found = []
    for batch in batches:
        y = encoded(model.blocks, batch.tokens)
        if y is None:
            return None
        found.append(model.norm(y))
    return found


def packed_pool(model: Any, batches: list[Batch]) -> Tensor:
    """Each image's features (images, D), in the order of the caller's list."""
    if model.global_pool == "":
        raise ValueError("fastvit.forward_packed: global_pool='' pools nothing; use forward_packed_features")
    pooled = [
        pool(b.tokens, model.global_pool, model.num_prefix_tokens, model.config.pool_include_prefix) for b in batches
    ]
    return torch.cat(pooled)[_inverse(batches)]


def unpacked(batches: list[Batch]) -> list[Tensor]:
    """The tokens (N, D) of each image, in the order of the caller's list."""
    tokens = [own for batch in batches for own in batch.tokens.unbind(0)]
    return [tokens[place] for place in _inverse(batches)]


def _inverse(batches: list[Batch]) -> list[int]:
    places = [place for batch in batches for place in batch.places]
    return sorted(range(len(places)), key=places.__getitem__)


def _through(model: Any, x: Tensor, row: Row | None = None) -> Tensor:
    if row is None and not model.grad_checkpointing:
        return model.norm(fused_blocks(model.blocks, x))
    for block in model.blocks:
        x = model._block(block, x, None, False, row)
    return model.norm(x)


def _sorted(model: Any, images: Sequence[Tensor]) -> list[tuple[list[int], list[Tensor]]]:
    """Images of one size and dtype together, those of few tokens first; cut to whole patches where these are pixels."""
    embed, channels = model.patch_embed, model.config.in_chans
    if not hasattr(embed, "grid_at"):
        raise TypeError(f"fastvit.forward_packed: no packed form of {type(embed).__name__}")
    if len(images) == 0:
        raise ValueError("fastvit.forward_packed: images must hold at least one image, got none")
    found: dict[tuple[Any, ...], tuple[list[int], list[Tensor]]] = {}
    p, q = embed.patch_size
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"fastvit.forward_packed: images[{i}] must be a Tensor, got {type(image).__name__}")
        if image.dim() != 3 or image.shape[0] != channels:
            raise ValueError(
                f"fastvit.forward_packed: images[{i}] must be ({channels}, height, width), got {tuple(image.shape)}"
            )
        height, width = image.shape[1:]
        if height < p or width < q:
            raise ValueError(
                f"fastvit.forward_packed: images[{i}] is {height} x {width} pixels, smaller than a patch of {p} x {q}"
            )
        rows, columns = embed.grid_at((height, width), (p, q))
        if isinstance(embed, PatchEmbed):
            height, width = rows * p, columns * q
        places, batch = found.setdefault((rows * columns, height, width, str(image.dtype)), ([], []))
        places.append(i)
        batch.append(image[:, :height, :width])
    return [found[key] for key in sorted(found)]
