"""timm: recognise VisionTransformer's modules and bind fused forwards to them.

timm's Block, Attention and Mlp carry the attribute names of :mod:`fastvit.layers`, so the forwards are the same
functions.
"""

from typing import Any

import timm.layers
import timm.models.vision_transformer as vit
from torch import Tensor, nn

from .. import layers, ops
from ..fused import BLOCK_OPS, fused_block, fused_blocks, has_hooks
from ..parts import activation_name, block_parts
from . import BlockCall, Options, Plan
from .torch_modules import plan_layer_norm, same_forward, why_not_linear, why_not_norm


def _why_not_attention(attn: Any) -> str | None:
    if not same_forward(attn, vit.Attention):
        return f"attention is {type(attn).__name__}"
    if getattr(attn, "gate", None) is not None:
        return "attention is gated"
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        return "attention normalises its output"
    for name in ("q_norm", "k_norm"):
        norm = getattr(attn, name)
        reason = None if isinstance(norm, nn.Identity) else why_not_norm(norm, timm.layers.LayerNorm)
        if reason:
            return f"{name}: {reason}"
    return why_not_linear("qkv", attn.qkv) or why_not_linear("proj", attn.proj)


def _why_not_mlp(mlp: Any) -> str | None:
    if not same_forward(mlp, timm.layers.Mlp):
        return f"MLP is {type(mlp).__name__}"
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        return "the MLP normalises its hidden layer"
    if activation_name(mlp.act) is None:
        return f"activation {type(mlp.act).__name__} has no fused form"
    return why_not_linear("fc1", mlp.fc1) or why_not_linear("fc2", mlp.fc2)


def _why_not_block(block: Any, options: Options) -> str | None:
    if not (options.attention and options.layer_norm and options.mlp):
        return "attention, layer_norm and mlp are not all switched on, so its parts are fused one by one"
    known = (nn.Identity, timm.layers.DropPath, vit.LayerScale)
    for name in ("ls1", "ls2", "drop_path1", "drop_path2"):
        if not isinstance(getattr(block, name), known):
            return f"{name} is a {type(getattr(block, name)).__name__}"
    for name in ("norm1", "norm2"):
        reason = why_not_norm(getattr(block, name), timm.layers.LayerNorm)
        if reason:
            return f"{name}: {reason}"
    return _why_not_attention(block.attn) or _why_not_mlp(block.mlp)


def _why_not_patch_embed(embed: Any) -> str | None:
    proj = embed.proj
    if type(proj) is not nn.Conv2d:
        return f"proj is a {type(proj).__name__}, not a torch.nn.Conv2d"
    if embed.dynamic_img_pad:
        return "dynamic_img_pad pads the image first"
    return None


def patch_embed_forward(embed: Any, x: Tensor) -> Tensor:
    """The projection of timm's PatchEmbed; its own norm, flattening and size checks are kept."""
    height, width = x.shape[-2:]
    p, q = embed.patch_size
    if embed.img_size is not None and embed.strict_img_size and (height, width) != tuple(embed.img_size):
        raise AssertionError(f"Input size {(height, width)} doesn't match model {tuple(embed.img_size)}.")
    grid = (height // p, width // q)
    if embed.img_size is not None and not embed.strict_img_size and (height % p or width % q):
        raise AssertionError(f"Input size {(height, width)} should be divisible by patch size {(p, q)}.")
    y = ops.patch_embed(x[..., : grid[0] * p, : grid[1] * q], embed.proj.weight, embed.proj.bias)
    if not embed.flatten:
        channels_last = y.view(y.shape[0], *grid, y.shape[-1])
        if embed.output_fmt == timm.layers.Format.NCHW:
            y = channels_last.permute(0, 3, 1, 2)
        elif embed.output_fmt == timm.layers.Format.NHWC:
            y = channels_last
        elif embed.output_fmt == timm.layers.Format.NCL:
            y = y.transpose(1, 2)
    return embed.norm(y)


def block_call(block: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> BlockCall:
    """A Block's call."""
    return BlockCall(x, attn_mask, is_causal)


def plan(module: nn.Module, options: Options, parent: nn.Module | None = None) -> Plan | str | None:
    """How to fuse this module, why not, or None when it is none of timm's ViT modules."""
    found = _plan(module, options)
    if isinstance(found, Plan) and found.whole and has_hooks(module):
        return "a module inside it carries a hook, which the fused forward would skip"
    return found


def _plan(module: Any, options: Options) -> Plan | str | None:
    if same_forward(module, vit.Block):
        reason = _why_not_block(module, options)
        return reason or Plan(fused_block, BLOCK_OPS, whole=True, parts=block_parts, call=block_call)
    if type(module) is nn.Sequential and len(module) and all(same_forward(block, vit.Block) for block in module):
        fusable = options.attention and options.layer_norm and options.mlp
        return Plan(fused_blocks, ("encoder",)) if fusable else None
    if same_forward(module, vit.Attention):
        if not options.attention:
            return "attention=False"
        reason = _why_not_attention(module)
        return reason or Plan(layers.Attention.forward, ("attention",), whole=True)
    if same_forward(module, timm.layers.Mlp):
        reason = "mlp=False" if not options.mlp else _why_not_mlp(module)
        return reason or Plan(layers.Mlp.forward, ("linear",), whole=True)
    if same_forward(module, timm.layers.PatchEmbed):
        reason = "patch_embed=False" if not options.patch_embed else _why_not_patch_embed(module)
        return reason or Plan(patch_embed_forward, ("patch_embed",), whole=True)
    if isinstance(module, timm.layers.LayerNorm):
        return plan_layer_norm(module, options, timm.layers.LayerNorm)
    return None
