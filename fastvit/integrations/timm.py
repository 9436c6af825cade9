"""timm: recognise VisionTransformer's modules and those of its relatives, and bind fused forwards to them."""

from typing import Any

import timm.layers
import timm.models.vision_transformer as vit
from torch import nn

from ..fused import BLOCK_OPS, fused_block, fused_blocks
from ..parts import block_parts
from . import Attended, Options, Plan, timm_blocks, timm_layers
from .timm_blocks import block_call
from .timm_layers import (
    why_not_all,
    why_not_attention,
    why_not_kinds,
    why_not_mlp,
    why_not_plain_attention,
    why_not_plain_mlp,
)
from .torch_modules import same_forward


def _why_not_block(block: Any, options: Options) -> str | None:
    known = (nn.Identity, timm.layers.DropPath, vit.LayerScale)
    return (
        why_not_all(options)
        or why_not_kinds(block, known, "ls1", "ls2")
        or timm_blocks.why_not_halves(block)
        or why_not_plain_attention(block.attn)
        or why_not_attention(block.attn, vit.Attention)
        or why_not_plain_mlp(block.mlp)
        or why_not_mlp(block.mlp)
    )


def attention_of(module: nn.Module) -> Attended | None:
    """How to read the attention of a block."""
    return timm_blocks.attention_of(module)


def plan(module: Any, options: Options, parent: nn.Module | None = None) -> Plan | str | None:
    """How to fuse this module, why not, or None when it is none of timm's ViT modules."""
    if same_forward(module, vit.Block):
        reason = _why_not_block(module, options)
        return reason or Plan(fused_block, BLOCK_OPS, whole=True, parts=block_parts, call=block_call)
    if type(module) is nn.Sequential and len(module) and all(same_forward(block, vit.Block) for block in module):
        return None if why_not_all(options) else Plan(fused_blocks, ("encoder",))
    return timm_blocks.plan(module, options) or timm_layers.plan(module, options)
