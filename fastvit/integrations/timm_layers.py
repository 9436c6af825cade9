"""timm's layers: what each must be to be fused, and what it computes then."""

from typing import Any

import timm.layers
import timm.models.vision_transformer as vit
from torch import Tensor, nn

from .. import ops
from ..fused import Rotation, attend, normed, projected
from ..parts import ABSENT, AttentionParts, activation_name, activation_of, attention_parts, linear_parts, norm_parts
from . import Options, Plan, torch_modules
from .torch_modules import same_forward

GATED_MLPS = (timm.layers.GluMlp, timm.layers.SwiGLU)
DROP_PATHS = (nn.Identity, timm.layers.DropPath)


def why_not_norm(norm: Any) -> str | None:
    """Why this is no LayerNorm over the last dimension, or None when it is one."""
    return torch_modules.why_not_norm(norm, timm.layers.LayerNorm)


def why_not_norms(module: Any, *names: str) -> str | None:
    """The same of several children, each a LayerNorm or, like one that is missing, an Identity."""
    for name in names:
        norm = getattr(module, name, ABSENT)
        reason = None if isinstance(norm, nn.Identity) else why_not_norm(norm)
        if reason:
            return f"{name}: {reason}"
    return None


def why_not_linears(module: Any, *names: str) -> str | None:
    """Why one of these children is no plain torch.nn.Linear, or None when all are."""
    for name in names:
        if reason := torch_modules.why_not_linear(name, getattr(module, name)):
            return reason
    return None


def why_not_kinds(block: Any, kinds: tuple[type[nn.Module], ...], *names: str) -> str | None:
    """Why one of these children is none of the classes, or None when all are."""
    for name in names:
        if not isinstance(child := getattr(block, name), kinds):
            return f"{name} is a {type(child).__name__}"
    return None


def why_not_all(options: Options) -> str | None:
    """Why whole blocks are not wanted, or None when they are."""
    if options.attention and options.layer_norm and options.mlp:
        return None
    return "attention, layer_norm and mlp are not all switched on, so its parts are fused one by one"


def why_not_attention(attn: Any, *classes: type[nn.Module]) -> str | None:
    """Why an attention module, to be one of these classes, has no fused form."""
    if not same_forward(attn, *classes):
        return f"attention is {type(attn).__name__}"
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        return f"attention is grouped: {attn.num_heads} heads of queries on {attn.num_kv_heads} of keys and values"
    names = ("qkv",) if attn.qkv is not None else ("q_proj", "k_proj", "v_proj")
    reason = why_not_norms(attn, "q_norm", "k_norm", "norm") or why_not_linears(attn, *names, "proj")
    if reason is None and getattr(attn, "gate", None) is not None:
        reason = why_not_linears(attn, "gate")
    return reason


def why_not_mlp(mlp: Any) -> str | None:
    """Why an MLP has no fused form."""
    if same_forward(mlp, timm.layers.SwiGLU):
        linears: tuple[str, ...] = ("fc1_g", "fc1_x", "fc2")
    elif same_forward(mlp, timm.layers.Mlp, timm.layers.GluMlp):
        linears = ("fc1", "fc2")
    else:
        return f"MLP is {type(mlp).__name__}"
    if isinstance(mlp, timm.layers.Mlp) and activation_name(mlp.act) is None:
        return f"activation {type(mlp.act).__name__} has no fused form"
    return why_not_norms(mlp, "norm") or why_not_linears(mlp, *linears)


def why_not_plain_attention(attn: Any) -> str | None:
    """Why an attention module does more than :class:`AttentionParts` say, or None when it does not."""
    if getattr(attn, "gate", None) is not None:
        return "attention is gated"
    if not isinstance(getattr(attn, "norm", ABSENT), nn.Identity):
        return "attention normalises its output"
    return None


def why_not_plain_mlp(mlp: Any) -> str | None:
    """Why an MLP does more than :class:`MlpParts` say, or None when it does not."""
    if isinstance(mlp, GATED_MLPS):
        return f"MLP is {type(mlp).__name__}"
    if not isinstance(getattr(mlp, "norm", ABSENT), nn.Identity):
        return "the MLP normalises its hidden layer"
    return None


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, or nothing for an Identity."""
    its = norm_parts(norm)
    return x if its is None else normed(x, its)


def attended(
    attn: Any,
    parts: AttentionParts,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rotate: Rotation | None = None,
) -> Tensor:
    """What an attention module's last projection reads, (B, N, D) to (B, N, H·E): normalised and gated on request."""
    y = attend(parts, projected(parts, x), attn_mask, is_causal, rotate)
    y = normalised(getattr(attn, "norm", ABSENT), y)
    gate = getattr(attn, "gate", None)
    return y if gate is None else y * ops.linear(x, gate.weight, gate.bias).sigmoid()


def attention_forward(attn: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm.layers.Attention."""
    y = attended(attn, attention_parts(attn), x, attn_mask, is_causal)
    return attn.proj_drop(ops.linear(y, *linear_parts(attn.proj)))


def hidden(mlp: Any, x: Tensor) -> Tensor:
    """What an MLP's last projection reads, (..., D) to (..., hidden)."""
    if isinstance(mlp, timm.layers.SwiGLU):
        gate = ops.linear(x, *linear_parts(mlp.fc1_g))
        h = mlp.act(gate) * ops.linear(x, *linear_parts(mlp.fc1_x))
    elif isinstance(mlp, timm.layers.GluMlp):
        first, second = ops.linear(x, *linear_parts(mlp.fc1)).chunk(2, dim=-1)
        h = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        h = ops.linear(x, *linear_parts(mlp.fc1), activation=activation_of(mlp.act))
    return normalised(getattr(mlp, "norm", ABSENT), mlp.drop1(h))


def mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    """timm's Mlp, GluMlp or SwiGLU (arXiv 2002.05202)."""
    return mlp.drop2(ops.linear(hidden(mlp, x), *linear_parts(mlp.fc2)))


def _why_not_patch_embed(embed: Any) -> str | None:
    proj = embed.proj
    if type(proj) is not nn.Conv2d:
        return f"proj is a {type(proj).__name__}, not a torch.nn.Conv2d"
    if embed.dynamic_img_pad:
        return "dynamic_img_pad pads the image first"
    return None


def patch_embed_forward(embed: Any, x: Tensor) -> Tensor:
    """The projection of timm's PatchEmbed; its own norm, flattening and size checks are kept."""
    if not x.is_floating_point():  # its own error message
        return type(embed).forward(embed, x)
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


def _why_not_group_norm(norm: Any) -> str | None:
    if norm._fast_norm:
        return "fast norm computes in autocast's dtype"
    return None if isinstance(norm.drop, nn.Identity) else f"drop is a {type(norm.drop).__name__}"


def group_norm_forward(norm: Any, x: Tensor) -> Tensor:
    """timm's GroupNormAct; its ReLU is part of the op, any other activation follows."""
    relu = same_forward(norm.act, nn.ReLU)
    y = ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, relu=relu)
    return y if relu else norm.act(y)


def _why_not_pool(pool: Any) -> str | None:
    if not isinstance(pool.q, nn.Identity) and (reason := why_not_linears(pool, "q")):
        return reason
    if not isinstance(pool.proj, nn.Identity) and (reason := why_not_linears(pool, "proj")):
        return reason
    mlp = None if pool.mlp is None else why_not_mlp(pool.mlp)
    return why_not_linears(pool, "kv") or why_not_norms(pool, "q_norm", "k_norm", "norm") or mlp


def attention_pool_forward(pool: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """timm's AttentionPoolLatent (SigLIP's head): learned queries attend to the tokens (B, N, D).

    The queries of all images are the same, so they are projected once.
    """
    if pool.pos_embed is not None:
        x = x + pool.pos_embed.unsqueeze(0).to(x.dtype)
    q = pool.latent if isinstance(pool.q, nn.Identity) else ops.linear(pool.latent, *linear_parts(pool.q))
    q = normalised(pool.q_norm, q.unflatten(-1, (pool.num_heads, -1))).transpose(1, 2)
    kv = ops.linear(x, *linear_parts(pool.kv)).unflatten(-1, (2, pool.num_heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4)
    k = normalised(pool.k_norm, k)
    y = ops.attention(q.expand(x.shape[0], -1, -1, -1).to(v.dtype), k.to(v.dtype), v, mask=attn_mask, scale=pool.scale)
    y = y.transpose(1, 2).flatten(2)
    y = pool.proj_drop(y if isinstance(pool.proj, nn.Identity) else ops.linear(y, *linear_parts(pool.proj)))
    if pool.mlp is not None:
        y = y + mlp_forward(pool.mlp, normalised(pool.norm, y))
    if pool.pool == "token":
        return y[:, 0]
    return y.mean(1) if pool.pool == "avg" else y


def plan(module: Any, options: Options) -> Plan | str | None:
    """How to fuse this layer, why not, or None when it is none of timm's known here."""
    if same_forward(module, vit.Attention):
        reason = None if options.attention else "attention=False"
        reason = reason or why_not_attention(module, vit.Attention)
        return reason or Plan(attention_forward, ("linear", "attention"), whole=True)
    if same_forward(module, timm.layers.Mlp, *GATED_MLPS):
        reason = why_not_mlp(module) if options.mlp else "mlp=False"
        return reason or Plan(mlp_forward, ("linear",), whole=True)
    if same_forward(module, timm.layers.PatchEmbed):
        reason = _why_not_patch_embed(module) if options.patch_embed else "patch_embed=False"
        return reason or Plan(patch_embed_forward, ("patch_embed",), whole=True)
    if same_forward(module, timm.layers.AttentionPoolLatent):
        reason = why_not_all(options) or _why_not_pool(module)
        return reason or Plan(attention_pool_forward, ("linear", "layer_norm", "attention"), whole=True)
    if same_forward(module, timm.layers.GroupNormAct):
        reason = _why_not_group_norm(module) if options.patch_embed else "patch_embed=False"
        return reason or Plan(group_norm_forward, ("group_norm",), whole=True)
    if isinstance(module, timm.layers.LayerNorm):
        return torch_modules.plan_layer_norm(module, options, timm.layers.LayerNorm)
    return None
