"""timm's encoder blocks beside the plain one: rotary positions, relative position biases, attention beside the MLP.

A block that computes no more than ``BlockParts`` say is one :func:`fused_block`. Where attention is gated or
normalised, or the MLP is, its two branches are fused one after the other.
"""

from functools import partial
from typing import Any

import timm.layers
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer as vit, vision_transformer_relpos as relpos
from torch import Tensor, nn

from .. import ops
from ..fused import BLOCK_OPS, BRANCH_OPS, Rotation, add_branch, fused_block
from ..parts import (
    ABSENT,
    AttentionParts,
    BlockParts,
    Norm,
    attention_parts,
    block_parts,
    linear_parts,
    mlp_parts,
    norm_parts,
)
from . import Attended, BlockCall, Options, Plan
from .timm_layers import (
    DROP_PATHS,
    attended,
    hidden,
    why_not_all,
    why_not_attention,
    why_not_kinds,
    why_not_linears,
    why_not_mlp,
    why_not_norm,
    why_not_norms,
    why_not_plain_attention,
    why_not_plain_mlp,
)
from .torch_modules import layer_norm_forward, same_forward

# a block's ops where its attention takes positions, for which no kernel runs the whole of it
STEPS = tuple(op for op in BLOCK_OPS if op != "encoder")
ROTARY = (eva.EvaAttention, timm.layers.AttentionRope)
# by name: an older timm has not all of them
DIFFERENTIAL = ("DiffAttention", "DiffParallelScalingBlock")


def block_call(block: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> BlockCall:
    """A Block's call, or a ParallelScalingBlock's."""
    return BlockCall(x, attn_mask, is_causal)


def why_not_halves(block: Any) -> str | None:
    """Why the norms and drop paths of a pre-norm block have no fused form, or None when they have one."""
    for name in ("norm1", "norm2"):
        reason = why_not_norm(getattr(block, name))
        if reason:
            return f"{name}: {reason}"
    return why_not_kinds(block, DROP_PATHS, "drop_path1", "drop_path2")


def _biases(attn: Any) -> tuple[Tensor | None, ...]:
    if getattr(attn, "q_bias", None) is not None:
        return attn.q_bias, attn.k_bias, attn.v_bias
    linears = (attn.qkv,) if attn.qkv is not None else (attn.q_proj, attn.k_proj, attn.v_proj)
    return tuple(linear.bias for linear in linears)


def eva_attention_parts(attn: Any) -> AttentionParts:
    """Of an attention module of EVA's or BEiT's, whose keys may have no bias, or of timm's AttentionRope."""
    linears = (attn.qkv,) if attn.qkv is not None else (attn.q_proj, attn.k_proj, attn.v_proj)
    return AttentionParts(
        tuple(linear.weight for linear in linears),
        _biases(attn),
        attn.num_heads,
        attn.scale,
        norm_parts(getattr(attn, "q_norm", ABSENT)),
        norm_parts(getattr(attn, "k_norm", ABSENT)),
        attn.attn_drop.p if attn.training else 0.0,
        linear_parts(attn.proj),
        attn.proj_drop,
    )


def eva_block_parts(block: Any) -> BlockParts:
    """Of a plain block of EVA's or BEiT's."""
    norm1, norm2 = block.norm1, block.norm2
    return BlockParts(
        (norm1.weight, norm1.bias, norm1.eps),
        eva_attention_parts(block.attn),
        block.gamma_1,
        block.drop_path1,
        (norm2.weight, norm2.bias, norm2.eps),
        mlp_parts(block.mlp),
        block.gamma_2,
        block.drop_path2,
    )


def rotated(attn: Any, rope: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, E), those behind the prefix tokens turned by the angles of timm's ``rope``."""
    prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)

    def turn(t: Tensor) -> Tensor:
        return torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)], dim=2)

    return turn(q), turn(k)


def _rotation(attn: Any, rope: Tensor | None) -> Rotation | None:
    return None if rope is None else partial(rotated, attn, rope)


def _plain(block: Any) -> bool:
    return why_not_plain_attention(block.attn) is None and why_not_plain_mlp(block.mlp) is None


def _run_block(block: Any, call: BlockCall) -> Tensor:
    if _plain(block):
        return fused_block(block, *call)
    attn, mlp, (x, mask, causal, rotate) = block.attn, block.mlp, call
    h = attended(attn, eva_attention_parts(attn), layer_norm_forward(block.norm1, x), mask, causal, rotate)
    x = add_branch(x, h, linear_parts(attn.proj), attn.proj_drop, block.gamma_1, block.drop_path1)
    h = hidden(mlp, layer_norm_forward(block.norm2, x))
    return add_branch(x, h, linear_parts(mlp.fc2), mlp.drop2, block.gamma_2, block.drop_path2)


def eva_attention_forward(
    attn: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """timm's EvaAttention or AttentionRope (RoPE: arXiv 2104.09864)."""
    y = attended(attn, eva_attention_parts(attn), x, attn_mask, is_causal, _rotation(attn, rope))
    return attn.proj_drop(ops.linear(y, *linear_parts(attn.proj)))


def eva_block_forward(
    block: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """timm's EvaBlock (EVA-02, arXiv 2303.11331; DINOv3)."""
    return _run_block(block, eva_block_call(block, x, rope, attn_mask, is_causal))


def eva_block_call(
    block: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> BlockCall:
    """An EvaBlock's call."""
    return BlockCall(x, attn_mask, is_causal, _rotation(block.attn, rope))


def _beit_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    if attn.relative_position_bias_table is None:
        return shared
    own = attn._get_rel_pos_bias()
    return own if shared is None else own + shared


def beit_attention_forward(attn: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """timm's attention of BEiT (arXiv 2106.08254), its scores shifted by a learned bias per distance."""
    y = attended(attn, eva_attention_parts(attn), x, _beit_bias(attn, shared_rel_pos_bias))
    return attn.proj_drop(ops.linear(y, *linear_parts(attn.proj)))


def beit_block_forward(block: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """timm's block of BEiT."""
    return _run_block(block, beit_block_call(block, x, shared_rel_pos_bias))


def beit_block_call(block: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> BlockCall:
    """A call of BEiT's block."""
    return BlockCall(x, _beit_bias(block.attn, shared_rel_pos_bias))


def _relpos_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    return shared if attn.rel_pos is None else attn.rel_pos.get_bias()


def relpos_attention_forward(attn: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """timm's RelPosAttention."""
    y = attended(attn, attention_parts(attn), x, _relpos_bias(attn, shared_rel_pos))
    return attn.proj_drop(ops.linear(y, *linear_parts(attn.proj)))


def relpos_block_forward(block: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
    """timm's RelPosBlock."""
    return fused_block(block, *relpos_block_call(block, x, shared_rel_pos))


def relpos_block_call(block: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> BlockCall:
    """A RelPosBlock's call."""
    return BlockCall(x, _relpos_bias(block.attn, shared_rel_pos))


def _why_not_parallel(block: Any) -> str | None:
    linears = ("out_proj",) if block.out_proj is not None else ("attn_out_proj", "mlp_out_proj")
    norm = why_not_norm(block.in_norm)
    return (
        (norm and f"in_norm: {norm}")
        or why_not_norms(block, "q_norm", "k_norm")
        or why_not_linears(block, "in_proj", *linears)
        or why_not_kinds(block, (nn.Identity, vit.LayerScale), "ls")
        or why_not_kinds(block, DROP_PATHS, "drop_path")
    )


def parallel_block_forward(block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm's ParallelScalingBlock: x + drop_path(γ · (MSA(LN(x)) + MLP(LN(x)))) (arXiv 2302.05442)."""
    y = ops.linear(layer_norm_forward(block.in_norm, x), *linear_parts(block.in_proj))
    width = block.in_split[0]
    h, qkv = y[..., :width], y[..., width:]
    y = ops.attention_packed(
        qkv,
        block.num_heads,
        q_norm=norm_parts(block.q_norm),
        k_norm=norm_parts(block.k_norm),
        mask=attn_mask,
        causal=is_causal,
        scale=block.scale,
        dropout=block.attn_drop.p if block.training else 0.0,
    )
    h = block.mlp_drop(block.mlp_act(h if block.mlp_bias is None else h + block.mlp_bias))
    if block.out_proj is not None:
        gamma = None if isinstance(block.ls, nn.Identity) else block.ls.gamma
        return add_branch(x, torch.cat((y, h), -1), linear_parts(block.out_proj), ABSENT, gamma, block.drop_path)
    y = ops.linear(y, *linear_parts(block.attn_out_proj))
    return x + block.drop_path(block.ls(ops.linear(h, *linear_parts(block.mlp_out_proj), residual=y)))


def _plan_block(block: Any, options: Options, forward: Any, call: Any, *attentions: type[nn.Module]) -> Plan | str:
    reason = why_not_all(options) or why_not_halves(block)
    reason = reason or why_not_attention(block.attn, *attentions) or why_not_mlp(block.mlp)
    if reason:
        return reason
    if _plain(block):
        return Plan(forward, STEPS, whole=True, parts=eva_block_parts, call=call)
    return Plan(forward, BRANCH_OPS, whole=True)


def _plan_attention(attn: Any, options: Options, forward: Any, *classes: type[nn.Module]) -> Plan | str:
    reason = why_not_attention(attn, *classes) if options.attention else "attention=False"
    return reason or Plan(forward, ("linear", "attention"), whole=True)


def plan(module: Any, options: Options) -> Plan | str | None:
    """How to fuse this block or its attention, why not, or None when it is none of these."""
    if type(module).__name__ in DIFFERENTIAL and type(module).__module__.startswith("timm."):
        return "differential attention has no fused form"
    if same_forward(module, eva.EvaBlock):
        return _plan_block(module, options, eva_block_forward, eva_block_call, *ROTARY)
    if same_forward(module, *ROTARY):
        return _plan_attention(module, options, eva_attention_forward, *ROTARY)
    if same_forward(module, beit.Block):
        return _plan_block(module, options, beit_block_forward, beit_block_call, beit.Attention)
    if same_forward(module, beit.Attention):
        return _plan_attention(module, options, beit_attention_forward, beit.Attention)
    if same_forward(module, relpos.RelPosBlock):
        reason = why_not_all(options) or why_not_halves(module)
        reason = reason or why_not_attention(module.attn, relpos.RelPosAttention) or why_not_mlp(module.mlp)
        reason = reason or why_not_kinds(module, (nn.Identity, vit.LayerScale), "ls1", "ls2")
        reason = reason or why_not_plain_attention(module.attn) or why_not_plain_mlp(module.mlp)
        return reason or Plan(relpos_block_forward, STEPS, whole=True, parts=block_parts, call=relpos_block_call)
    if same_forward(module, relpos.RelPosAttention):
        return _plan_attention(module, options, relpos_attention_forward, relpos.RelPosAttention)
    if same_forward(module, vit.ParallelScalingBlock):
        reason = why_not_all(options) or _why_not_parallel(module)
        return reason or Plan(parallel_block_forward, BRANCH_OPS, whole=True)
    return None


# pre-norm block, post-norm block, their attention's classes and parts, the meaning of a call
_ATTENTIONS: tuple[tuple[Any, Any, tuple[type[nn.Module], ...], Any, Any], ...] = (
    (vit.Block, vit.ResPostBlock, (vit.Attention,), attention_parts, block_call),
    (eva.EvaBlock, eva.EvaBlockPostNorm, ROTARY, eva_attention_parts, eva_block_call),
    (beit.Block, (), (beit.Attention,), eva_attention_parts, beit_block_call),
    (relpos.RelPosBlock, relpos.ResPostRelPosBlock, (relpos.RelPosAttention,), attention_parts, relpos_block_call),
)


def attention_of(block: Any) -> Attended | None:
    """How to read the attention of a block, whatever else it computes, or None for one that is not known."""
    for before, behind, attentions, parts, call in _ATTENTIONS:
        normed = same_forward(block, before)
        if normed or (behind and same_forward(block, behind)):
            known = not (normed and why_not_norm(block.norm1)) and not why_not_attention(block.attn, *attentions)
            return Attended(partial(_norm_and_attention, parts, normed), call) if known else None
    parallel = same_forward(block, vit.ParallelScalingBlock) and not _why_not_parallel(block)
    return Attended(parallel_attention_parts, block_call) if parallel else None


def _norm_and_attention(parts: Any, normed: bool, block: Any) -> tuple[Norm | None, AttentionParts]:
    norm = block.norm1
    return (norm.weight, norm.bias, norm.eps) if normed else None, parts(block.attn)


def parallel_attention_parts(block: Any) -> tuple[Norm | None, AttentionParts]:
    """Of a ParallelScalingBlock, whose first projection makes the MLP's hidden layer in front of q, k and v."""
    (weight, bias), width = linear_parts(block.in_proj), block.in_split[0]
    return norm_parts(block.in_norm), AttentionParts(
        (weight[width:],),
        (None if bias is None else bias[width:],),
        block.num_heads,
        block.scale,
        norm_parts(block.q_norm),
        norm_parts(block.k_norm),
        block.attn_drop.p if block.training else 0.0,
        linear_parts(block.attn_out_proj if block.out_proj is None else block.out_proj),
        ABSENT,
    )
