"""torchvision: recognise VisionTransformer's modules and bind fused forwards to them."""

from typing import Any

import torchvision.models.vision_transformer as vit
from torch import Tensor, nn

from .. import ops
from ..fused import BLOCK_OPS, active, fused_block, fused_blocks
from ..parts import ABSENT, AttentionParts, BlockParts, LinearParts, MlpParts, Norm, activation_name, activation_of
from . import Attended, BlockCall, Options, Plan
from .torch_modules import plan_patches, same_forward, why_not_linear, why_not_norm


def attention_parts(attn: nn.MultiheadAttention, proj_drop: nn.Module = ABSENT) -> AttentionParts:
    """Of a torch.nn.MultiheadAttention with one in_proj_weight."""
    assert attn.in_proj_weight is not None
    return AttentionParts(
        (attn.in_proj_weight,),
        (attn.in_proj_bias,),
        attn.num_heads,
        attn.head_dim**-0.5,
        None,
        None,
        attn.dropout if attn.training else 0.0,
        LinearParts(attn.out_proj.weight, attn.out_proj.bias),
        proj_drop,
    )


def block_parts(block: Any) -> BlockParts:
    """Of an EncoderBlock."""
    norm1, norm2, (fc1, act, hidden_drop, fc2, drop) = block.ln_1, block.ln_2, block.mlp
    return BlockParts(
        (norm1.weight, norm1.bias, norm1.eps),
        attention_parts(block.self_attention, block.dropout),
        None,
        ABSENT,
        (norm2.weight, norm2.bias, norm2.eps),
        MlpParts(
            LinearParts(fc1.weight, fc1.bias), activation_of(act), hidden_drop, LinearParts(fc2.weight, fc2.bias), drop
        ),
        None,
        ABSENT,
    )


def block_call(block: nn.Module, input: Tensor) -> BlockCall:
    """An EncoderBlock's call."""
    return BlockCall(input)


def block_forward(block: Any, input: Tensor) -> Tensor:
    """EncoderBlock, (B, N, D) to (B, N, D)."""
    if input.dim() != 3:  # its own error message
        return type(block).forward(block, input)
    return fused_block(block, input)


def mlp_forward(mlp: Any, input: Tensor) -> Tensor:
    """MLPBlock, (..., D) to (..., D)."""
    fc1, act, hidden_drop, fc2, drop = mlp
    hidden = ops.linear(input, fc1.weight, fc1.bias, activation=activation_of(act))
    y = ops.linear(hidden_drop(hidden) if active(hidden_drop) else hidden, fc2.weight, fc2.bias)
    return drop(y)


def _why_not_attention(attn: Any) -> str | None:
    if not same_forward(attn, nn.MultiheadAttention):
        return f"attention is {type(attn).__name__}"
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
        return "MultiheadAttention has other keys and values, or not the batch first"
    out_proj = type(attn.out_proj)  # MultiheadAttention's own, which differs in nothing that it computes
    return (
        None
        if out_proj is nn.modules.linear.NonDynamicallyQuantizableLinear
        else why_not_linear("out_proj", attn.out_proj)
    )


def _why_not_mlp(mlp: Any) -> str | None:
    if not same_forward(mlp, vit.MLPBlock) or [type(m) for m in mlp][::2] != [nn.Linear, nn.Dropout, nn.Dropout]:
        return f"MLP is {type(mlp).__name__}"
    if activation_name(mlp[1]) is None:
        return f"activation {type(mlp[1]).__name__} has no fused form"
    return why_not_linear("mlp[3]", mlp[3])


def _why_not_block(block: Any, options: Options) -> str | None:
    if not (options.attention and options.layer_norm and options.mlp):
        return "attention, layer_norm and mlp are not all switched on, so its parts are fused one by one"
    for name in ("ln_1", "ln_2"):
        reason = why_not_norm(getattr(block, name))
        if reason:
            return f"{name}: {reason}"
    if type(block.dropout) is not nn.Dropout:
        return f"dropout is a {type(block.dropout).__name__}"
    return _why_not_attention(block.self_attention) or _why_not_mlp(block.mlp)


def attention_of(module: Any) -> Attended | None:
    """How to read the attention of an EncoderBlock."""
    if not same_forward(module, vit.EncoderBlock) or why_not_norm(module.ln_1):
        return None
    return None if _why_not_attention(module.self_attention) else Attended(norm_and_attention, block_call)


def norm_and_attention(block: Any) -> tuple[Norm, AttentionParts]:
    """Of an EncoderBlock, whatever its MLP is."""
    return (block.ln_1.weight, block.ln_1.bias, block.ln_1.eps), attention_parts(block.self_attention)


def plan(module: Any, options: Options, parent: nn.Module | None = None) -> Plan | str | None:
    """How to fuse this module, why not, or None when it is none of torchvision's ViT modules."""
    if same_forward(module, vit.EncoderBlock):
        reason = _why_not_block(module, options)
        return reason or Plan(block_forward, BLOCK_OPS, whole=True, parts=block_parts, call=block_call)
    if type(module) is nn.Sequential and len(module) and all(same_forward(b, vit.EncoderBlock) for b in module):
        fusable = options.attention and options.layer_norm and options.mlp
        return Plan(fused_blocks, ("encoder",)) if fusable else None
    if same_forward(module, vit.MLPBlock):
        reason = _why_not_mlp(module) if options.mlp else "mlp=False"
        return reason or Plan(mlp_forward, ("linear",), whole=True)
    if isinstance(parent, vit.VisionTransformer) and module is parent.conv_proj and isinstance(module, nn.Conv2d):
        return plan_patches(module, options)
    return None
