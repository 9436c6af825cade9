"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929), under timm's names."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .config import POOLINGS, PRESETS, Size, ViTConfig, override, pair, preset
from .fused import fused_blocks
from .initialize import initialize, zeroed
from .layers import Block, LayerNorm, PatchDropout, PatchEmbed, pool
from .packed import packed_features, packed_pool, unpacked
from .positions import TABLES, added_positions, check_resize, position_tables, resized_tables

if TYPE_CHECKING:
    from .hybrid import HybridEmbed


class VisionTransformer(nn.Module):
    """Images (B, C, height, width) to logits (B, num_classes), parameters and options named as timm's.

    Args:
        config: a :class:`fastvit.ViTConfig`; its options can be given, or overridden, by keyword.
        device, dtype: of the parameters.

    Raises:
        TypeError: an unknown option; ValueError: an option out of range.
    """

    def __init__(self, config: ViTConfig | None = None, *, device=None, dtype=None, **options: Any) -> None:
        super().__init__()
        self.config = c = override(config or ViTConfig(), options)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.global_pool, self.num_prefix_tokens = c.num_classes, c.global_pool, c.prefix_tokens
        self.num_features = self.head_hidden_size = self.embed_dim = c.embed_dim
        self.grad_checkpointing = False
        fc_norm = c.global_pool in ("avg", "avgmax", "max") if c.fc_norm is None else c.fc_norm

        def norm(present: bool) -> nn.Module:
            return LayerNorm(c.embed_dim, c.norm_eps, **dd) if present else nn.Identity()

        def table(rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, rows, c.embed_dim, **dd)) if rows else None

        self.patch_embed: PatchEmbed | HybridEmbed = _embedding(c)(
            c.img_size,
            c.patch_size,
            c.in_chans,
            c.embed_dim,
            not c.pre_norm,
            not c.dynamic_img_size,
            c.of_each_channel(c.mean),
            c.of_each_channel(c.std),
            **dd,
        )
        self.cls_token, self.reg_token = table(int(c.class_token)), table(c.reg_tokens)
        for name, parameter in position_tables(c, self.patch_embed.grid_size, **dd).items():
            setattr(self, name, parameter)
        tokens = self.patch_embed.num_patches + c.prefix_tokens
        self.pos_drop = nn.Dropout(c.pos_drop_rate)
        self.patch_drop = PatchDropout(c.patch_drop_rate, c.prefix_tokens) if c.patch_drop_rate else nn.Identity()
        self.norm_pre = norm(c.pre_norm)
        self.blocks = nn.Sequential(
            *(
                Block(
                    c.embed_dim,
                    c.num_heads,
                    c.hidden_dim,
                    qkv_bias=c.qkv_bias,
                    qk_norm=c.qk_norm,
                    proj_bias=c.proj_bias,
                    proj_drop=c.proj_drop_rate,
                    attn_drop=c.attn_drop_rate,
                    init_values=c.init_values,
                    drop_path=c.drop_path_rate * i / max(1, c.depth - 1),
                    act_layer=c.act_layer,
                    norm_eps=c.norm_eps,
                    relative_tokens=tokens if c.pos_embed == "relative" else 0,
                    **dd,
                )
                for i in range(c.depth)
            )
        )
        reduction = max(self.patch_embed.patch_size)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": c.embed_dim, "reduction": reduction} for i in range(c.depth)
        ]
        self.norm = norm(c.final_norm and not fc_norm)
        self.fc_norm = norm(c.final_norm and fc_norm)
        self.pre_logits: nn.Module = nn.Identity()
        if c.representation_size:
            hidden = nn.Linear(c.embed_dim, c.representation_size, **dd)
            self.pre_logits = nn.Sequential(OrderedDict(fc=hidden, act=nn.Tanh()))
            self.num_features = self.head_hidden_size = c.representation_size
        self.head_drop = nn.Dropout(c.drop_rate)
        self.head = nn.Linear(self.num_features, c.num_classes, **dd) if c.num_classes else nn.Identity()
        self.init_weights(c.weight_init)

    def init_weights(self, mode: str = "") -> None:
        """Initialise the parameters by one of timm's schemes (see :class:`fastvit.ViTConfig`)."""
        initialize(self, mode, self.num_classes)
        if self.config.fix_init:
            with torch.no_grad():
                for i, block in enumerate(self.blocks):
                    for weight in (block.get_parameter("attn.proj.weight"), block.get_parameter("mlp.fc2.weight")):
                        weight.div_((2.0 * (i + 1)) ** 0.5)

    def _embed(self, x: Tensor, any_size: bool = False) -> Tensor:
        """Tokens with positions, in the order of timm: prefix, positions, dropout, patch dropout, norm_pre."""
        prefix: list[Tensor] = [t for t in (self.cls_token, self.reg_token) if t is not None]
        patch_embed, c = self.patch_embed, self.config
        home = grid = patch_embed.grid_size
        if any_size or c.dynamic_img_size:
            grid = patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        positions = added_positions(c, self._position_tables(), grid, home, c.pos_resize)
        x = patch_embed(x, positions, torch.cat(prefix, 1) if prefix else None, any_size=any_size)
        return self.norm_pre(self.patch_drop(self.pos_drop(x)))

    def _position_tables(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in TABLES}

    def _block(self, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return recompute(block, x, *args, use_reentrant=False)
        return block(x, *args)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, prefix + N, D) after the last block and ``norm``."""
        x = self._embed(x)
        if attn_mask is None and not is_causal and not self.grad_checkpointing:
            return self.norm(fused_blocks(self.blocks, x))
        for block in self.blocks:
            x = self._block(block, x, attn_mask, is_causal)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features, and logits (B, num_classes) unless ``pre_logits``."""
        x = pool(x, self.global_pool, self.num_prefix_tokens, self.config.pool_include_prefix)
        return self._classify(x, pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pre_logits(self.fc_norm(x)))
        return x if pre_logits else self.head(x)

    def forward_packed(self, images: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Logits (len(images), num_classes) of images of different sizes, in one pass without padding.

        What each image gives alone, positions resized to its own grid (``pos_resize``, paper, section 3.2); whatever
        ``dynamic_img_size`` says. Many images of one size cost what a batch of them does.

        Args:
            images: (C, height, width) each, uint8 or of the model's dtype; what is left of whole patches at the right
                and lower edge is cut off.
            pre_logits: the pooled features (len(images), D) instead.

        Raises:
            ValueError: no images, one smaller than a patch or with other channels, global_pool=''; relative positions
                and an image of another grid. TypeError: no tensors.
        """
        return self._classify(packed_pool(self, packed_features(self, images)), pre_logits)

    def forward_packed_features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Tokens (prefix + N_i, D) of each image after the last block and ``norm``; see :meth:`forward_packed`."""
        return unpacked(packed_features(self, images))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Features and the outputs of chosen blocks, as timm returns them.

        Args:
            indices: the last n blocks (an integer), those of these indices, or all (None).
            return_prefix_tokens: pair each intermediate with its prefix tokens.
            norm: apply the final norm to intermediates. stop_early: run no block behind the last one asked for.
            output_fmt: "NCHW" (B, D, height, width) or "NLC" (B, N, D) intermediates, without prefix tokens.
            intermediates_only: return the list alone, else (features, list). output_dict: a dict instead.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"fastvit: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take = self._take_indices(indices)
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = self._embed(x)
        taken = []
        blocks: list[nn.Module] = list(self.blocks)
        for i, block in enumerate(blocks[: max(take) + 1] if stop_early and take else blocks):
            x = self._block(block, x, attn_mask, is_causal)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        n = self.num_prefix_tokens
        prefix, maps = [y[:, :n] for y in taken], [y[:, n:] for y in taken]
        if output_fmt == "NCHW":
            maps = [y.reshape(y.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for y in maps]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if n and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else {**result, "image_features": self.norm(x)}
        found: list[Any] = list(zip(maps, prefix, strict=True)) if n and return_prefix_tokens else maps
        return found if intermediates_only else (self.norm(x), found)

    def _take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        depth = len(self.blocks)
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 0 < indices <= depth:
                raise ValueError(f"fastvit: the last n blocks: n must be in 1..{depth}, got {indices}")
            return list(range(depth - indices, depth))
        if not all(-depth <= i < depth for i in indices):
            raise ValueError(f"fastvit: indices must be in {-depth}..{depth - 1}, got {list(indices)}")
        return [i % depth for i in indices]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, *, zero_init: bool = False) -> None:
        """A new head for K classes (0 = none), and another pooling if given; the final norm stays where it is.

        ``zero_init``: the paper's start of fine-tuning (section 3.2). The whole pre-trained head goes, ``pre_logits``
        included, for a D x K layer of zeros: every logit is 0 and the loss ln K at first.
        """
        if global_pool is not None:
            if global_pool not in POOLINGS or (global_pool == "token" and self.cls_token is None):
                raise ValueError(f"fastvit: global_pool {global_pool!r} does not fit this model; valid: {POOLINGS}")
            self.global_pool = global_pool
        if zero_init:
            self.pre_logits = nn.Identity()
            self.num_features = self.head_hidden_size = self.embed_dim
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = self.patch_embed.proj.weight
            head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self.head = zeroed(head.train(self.training)) if zero_init else head.train(self.training)

    def set_input_size(
        self, img_size: Size | None = None, patch_size: Size | None = None, pos_resize: str | None = None
    ) -> None:
        """Change image or patch size, of any aspect ratio; positions are interpolated, the projection is resampled.

        Args:
            pos_resize: how, "timm", "original", ... as in :class:`fastvit.ViTConfig`, whose own is the default.

        Raises:
            ValueError: a size that holds no patch, no such way, or relative positions and another grid.
        """
        embed, way = self.patch_embed, pos_resize or self.config.pos_resize
        before = embed.grid_size
        size = pair(embed.img_size if img_size is None else img_size, "img_size")
        patch = pair(embed.patch_size if patch_size is None else patch_size, "patch_size")
        check_resize(self.config, before, embed.grid_at(size, patch), way)
        embed.set_input_size(img_size, patch_size)
        if embed.grid_size == before:
            return
        for name, table in resized_tables(self.config, self._position_tables(), embed.grid_size, before, way).items():
            if table is not None:
                setattr(self, name, nn.Parameter(table.detach(), requires_grad=getattr(self, name).requires_grad))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block, and bottleneck, in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        if not isinstance(self.patch_embed, PatchEmbed):
            self.patch_embed.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimisers should not decay."""
        more = {n for n, _ in self.named_parameters() if n.startswith("pos_embed_") or n.endswith("relative_keys")}
        return {"pos_embed", "cls_token", "reg_token"} | more

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem and blocks, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _embedding(config: ViTConfig) -> "type[PatchEmbed] | partial[HybridEmbed]":
    """What makes tokens of images, without the options that all kinds have."""
    if config.backbone is None:
        return PatchEmbed
    from .hybrid import HybridEmbed  # what no other model needs

    return partial(HybridEmbed, config.backbone, config.backbone_stride, config.backbone_eps)


def create_model(
    name: str,
    checkpoint: str | PathLike[str] | None = None,
    *,
    weights_only: bool | None = None,
    device=None,
    dtype=None,
    **options: Any,
) -> VisionTransformer:
    """A Vision Transformer by its timm name, e.g. ``create_model("vit_base_patch16_224", num_classes=10)``.

    Args:
        name: one of :func:`list_models`.
        checkpoint: a file or directory for :func:`fastvit.load_checkpoint`, which has the options that files may need.
            If ``num_classes`` is given and the file has a head for another number, the model's stays as initialised;
            with ``weight_init="zero_head"`` it is zero in any case (paper, section 3.2), and the file's is left out.
        weights_only: True reads a ``.pt``, ``.pth`` or ``.bin``, too.
        options: any option of :class:`fastvit.ViTConfig`.

    Raises:
        ValueError: an unknown name (the message lists close ones), an option out of range, or a checkpoint that does
            not fit; TypeError: unknown option.
    """
    model = VisionTransformer(preset(name), device=device, dtype=dtype, **options)
    if checkpoint is None:
        return model
    from .checkpoints import load_checkpoint  # what no other model needs

    zero_head = model.config.weight_init == "zero_head"
    load_checkpoint(model, checkpoint, weights_only=weights_only, drop_head=zero_head or "num_classes" in options)
    if zero_head and model.num_classes:
        zeroed(model.head)
    return model


def list_models() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(PRESETS)
