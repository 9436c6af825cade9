"""transformers: recognise the layers of its Vision Transformers and bind fused forwards to them.

Its models are written one file each, with the same few layers under other names: a family says how its attributes are
called. Classes are known by name, so that nothing of transformers is imported before a model is there.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..fused import (
    BLOCK_OPS,
    BRANCH_OPS,
    IDLE_HOOKS,
    add_branch,
    attend,
    fused_block,
    fused_mlp,
    heads,
    normed,
    projected,
)
from ..parts import ABSENT, AttentionParts, BlockParts, MlpParts, Norm, activation_name, activation_of, linear_parts
from . import Attended, BlockCall, Options, Plan
from .attention_interface import attention_arguments, attention_forward, collecting_attentions, register
from .torch_modules import layer_norm_forward, plan_patches, why_not_linear, why_not_norm

__all__ = ["plan", "register"]

# The hooks that collect hidden states and attentions stay on a model for good, and do nothing until it is asked again.
IDLE_HOOKS["transformers.utils.output_capturing"] = lambda: not collecting_attentions()


@dataclass(frozen=True)
class Family:
    """What a kind of encoder layer calls its parts; "" for what it does not have."""

    norm1: str
    norm2: str
    attention: str = "attention"
    dropout: str = ""
    layer_scale1: str = ""
    layer_scale2: str = ""
    drop_path: str = ""


_VIT = Family("layernorm_before", "layernorm_after", dropout="dropout")
_DINO = Family("norm1", "norm2", layer_scale1="layer_scale1", layer_scale2="layer_scale2", drop_path="drop_path")
_CLIP = Family("layer_norm1", "layer_norm2", attention="self_attn")
_BEIT = Family(
    "layernorm_before",
    "layernorm_after",
    dropout="dropout",
    layer_scale1="lambda_1",
    layer_scale2="lambda_2",
    drop_path="drop_path",
)

_LAYERS = {
    "vit.ViTLayer": _VIT,
    "deit.DeiTLayer": _VIT,
    "vit_msn.ViTMSNLayer": _VIT,
    "vit_mae.ViTMAELayer": _VIT,
    "ijepa.IJepaLayer": _VIT,
    "audio_spectrogram_transformer.ASTLayer": _VIT,
    "vivit.VivitLayer": _VIT,
    "dinov2.Dinov2Layer": _DINO,
    "dinov2_with_registers.Dinov2WithRegistersLayer": _DINO,
    "dinov3_vit.DINOv3ViTLayer": _DINO,
    "eomt_dinov3.EomtDinov3Layer": _DINO,
    "clip.CLIPEncoderLayer": _CLIP,
    "clipseg.CLIPSegEncoderLayer": _CLIP,
    "altclip.AltCLIPEncoderLayer": _CLIP,
    "chinese_clip.ChineseCLIPVisionLayer": _CLIP,
    "metaclip_2.MetaClip2EncoderLayer": _CLIP,
    "siglip.SiglipEncoderLayer": _CLIP,
    "siglip2.Siglip2EncoderLayer": _CLIP,
    "idefics3.Idefics3EncoderLayer": _CLIP,
    "smolvlm.SmolVLMEncoderLayer": _CLIP,
    "beit.BeitLayer": _BEIT,
}
_ATTENTIONS = {
    "vit.ViTAttention",
    "deit.DeiTAttention",
    "vit_msn.ViTMSNAttention",
    "vit_mae.ViTMAEAttention",
    "ijepa.IJepaAttention",
    "audio_spectrogram_transformer.ASTAttention",
    "vivit.VivitAttention",
    "beit.BeitAttention",
    "dinov2.Dinov2Attention",
    "dinov2_with_registers.Dinov2WithRegistersAttention",
    "dinov3_vit.DINOv3ViTAttention",
    "eomt_dinov3.EomtDinov3Attention",
    "clip.CLIPAttention",
    "clipseg.CLIPSegAttention",
    "altclip.AltCLIPAttention",
    "chinese_clip.ChineseCLIPVisionAttention",
    "metaclip_2.MetaClip2Attention",
    "siglip.SiglipAttention",
    "siglip2.Siglip2Attention",
    "idefics3.Idefics3VisionAttention",
    "smolvlm.SmolVLMVisionAttention",
}
_MLPS = {name.removesuffix("Attention") + "MLP" for name in _ATTENTIONS}
_GATED_MLPS = {
    "dinov2.Dinov2SwiGLUFFN",
    "dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN",
    "dinov3_vit.DINOv3ViTGatedMLP",
}
_GATED = ("gate_proj", "up_proj", "down_proj")
# modules that hold a projection of patches, and its attribute
_PATCHES = {
    **{
        f"{name}PatchEmbeddings": "projection"
        for name in (
            "vit.ViT",
            "deit.DeiT",
            "vit_msn.ViTMSN",
            "vit_mae.ViTMAE",
            "ijepa.IJepa",
            "beit.Beit",
            "dinov2.Dinov2",
            "dinov2_with_registers.Dinov2WithRegisters",
        )
    },
    "dinov3_vit.DINOv3ViTEmbeddings": "patch_embeddings",
    **{
        f"{name}VisionEmbeddings": "patch_embedding"
        for name in (
            "clip.CLIP",
            "clipseg.CLIPSeg",
            "altclip.AltCLIP",
            "chinese_clip.ChineseCLIP",
            "metaclip_2.MetaClip2",
            "siglip.Siglip",
        )
    },
}
# what a model may pass along that changes nothing in a layer
_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "use_cache", "is_causal"}


def _name(module: Any) -> str:
    """The class of transformers, "model.Class", whose forward a module has, or ""."""
    kind: Any = type(module)
    for base in kind.__mro__:
        package, _, rest = base.__module__.partition(".models.")
        if package == "transformers":
            same = inspect.unwrap(kind.forward) is inspect.unwrap(base.forward)
            return f"{rest.partition('.')[0]}.{base.__name__}" if same else ""
    return ""


def _either(module: nn.Module, *names: str) -> Any:
    return getattr(module, next(name for name in names if hasattr(module, name)))


def attention_parts(attn: Any, proj_drop: nn.Module = ABSENT) -> AttentionParts:
    """Of an attention module."""
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    return AttentionParts(
        tuple(linear.weight for linear in projections),
        tuple(linear.bias for linear in projections),
        _either(attn, "num_attention_heads", "num_heads"),
        _either(attn, "scaling", "scale"),
        None,
        None,
        _either(attn, "attention_dropout", "dropout") if attn.training else 0.0,
        linear_parts(_either(attn, "o_proj", "out_proj")),
        proj_drop,
    )


def mlp_parts(mlp: Any, drop: nn.Module = ABSENT) -> MlpParts:
    """Of an MLP module."""
    activation = activation_of(_either(mlp, "activation_fn", "act_fn"))
    fc1, fc2 = _either(mlp, "fc1", "up_proj"), _either(mlp, "fc2", "down_proj")
    return MlpParts(linear_parts(fc1), activation, ABSENT, linear_parts(fc2), drop)


def _gamma(layer: nn.Module, name: str) -> Tensor | None:
    scale: Any = getattr(layer, name) if name else None
    scale = getattr(scale, "lambda1", scale)  # a module with the factor, the factor, or 1.0 for none
    return scale if isinstance(scale, Tensor) else None


def layer_parts(family: Family, layer: Any) -> BlockParts:
    """Of an encoder layer of this family."""
    norm1, norm2 = getattr(layer, family.norm1), getattr(layer, family.norm2)
    dropout = getattr(layer, family.dropout) if family.dropout else ABSENT
    drop_path = getattr(layer, family.drop_path) if family.drop_path else ABSENT
    return BlockParts(
        (norm1.weight, norm1.bias, norm1.eps),
        attention_parts(getattr(layer, family.attention), dropout),
        _gamma(layer, family.layer_scale1),
        drop_path,
        (norm2.weight, norm2.bias, norm2.eps),
        mlp_parts(layer.mlp, dropout),
        _gamma(layer, family.layer_scale2),
        drop_path,
    )


class Rotation:
    """DINOv3's rotary positions (B or 1, patches, E): of the tokens behind the prefix, first half against second."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self._cos, self._sin = cos, sin

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._turned(q), self._turned(k)

    def _turned(self, t: Tensor) -> Tensor:
        prefix, patches = t.split((t.shape[-2] - self._sin.shape[-2], self._sin.shape[-2]), dim=-2)
        first, second = patches.chunk(2, dim=-1)
        turned = patches * self._cos + torch.cat((-second, first), dim=-1) * self._sin
        return torch.cat((prefix, turned.to(t.dtype)), dim=-2)


def _understood(mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call's mask and other arguments are those that the ops can take; else it is the module's own affair."""
    return (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)) and all(
        value is None or name in _HARMLESS for name, value in kwargs.items()
    )


def layer_call(
    family: Family, layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> BlockCall | None:
    """A layer's call, or None for one that only the layer's own forward understands."""
    attn, bias = getattr(layer, family.attention), getattr(layer, "relative_position_bias", None)
    positions = kwargs.pop("position_embeddings", None)
    interpolate, resolution = kwargs.pop("interpolate_pos_encoding", False), kwargs.pop("resolution", None)
    if hidden_states.dim() != 3 or not _understood(attention_mask, kwargs):
        return None
    mask, causal = attention_arguments(attn, hidden_states[:, None], attention_mask, kwargs)
    if bias is not None:
        window = resolution[0] // layer.patch_size, resolution[1] // layer.patch_size
        added = bias(window, interpolate, dim_size=hidden_states.shape[1])
        mask = added if mask is None else added + mask
    return BlockCall(hidden_states, mask, causal, None if positions is None else Rotation(*positions))


def layer_forward(family: Family, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """An encoder layer, (B, N, D) to (B, N, D), under gradient checkpointing where it is on."""
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(_layer, family, layer, **kwargs), *args)
    return _layer(family, layer, *args, **kwargs)


def _layer(family: Family, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
    asked = kwargs.get("output_attentions") or collecting_attentions(getattr(layer, family.attention))
    call = None if asked else layer_call(family, layer, *args, **kwargs)
    if call is not None:
        return _gated_layer(family, layer, call) if hasattr(layer.mlp, _GATED[0]) else fused_block(layer, *call)
    forward = inspect.unwrap(type(layer).forward)  # without the checkpointing that its class puts around it
    return forward(layer, *args, **kwargs)


def _gated_layer(family: Family, layer: Any, call: BlockCall) -> Tensor:
    x, mask, causal, rotate = call
    (norm, attention), mlp = norm_and_attention(family, layer), layer.mlp
    gammas, drop_path = (family.layer_scale1, family.layer_scale2), getattr(layer, family.drop_path)
    h = attend(attention, projected(attention, normed(x, norm)), mask, causal, rotate)
    x = add_branch(x, h, attention.proj, ABSENT, _gamma(layer, gammas[0]), drop_path)
    h = gated(mlp, layer_norm_forward(getattr(layer, family.norm2), x))
    return add_branch(x, h, linear_parts(mlp.down_proj), ABSENT, _gamma(layer, gammas[1]), drop_path)


def attention_module_forward(
    attn: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention module, (B, N, D) to (B, N, D), with its weights where they are asked for."""
    if not _understood(attention_mask, kwargs):
        rotated = {} if position_embeddings is None else {"position_embeddings": position_embeddings}
        return type(attn).forward(attn, hidden_states, attention_mask, **rotated, **kwargs)
    parts = attention_parts(attn)
    rotate = None if position_embeddings is None else Rotation(*position_embeddings)
    q, k, v = heads(parts, projected(parts, hidden_states), rotate)
    wanted = kwargs.pop("output_attentions", None) or attn.config._attn_implementation == "eager"
    y, weights = attention_forward(
        attn, q, k, v, attention_mask, parts.dropout, parts.scale, output_attentions=wanted, **kwargs
    )
    return ops.linear(y.flatten(2), *parts.proj), weights


def gated(mlp: Any, x: Tensor) -> Tensor:
    """What a gated MLP's last projection reads, (..., D) to (..., hidden): act(gate) · up (arXiv 2002.05202)."""
    return mlp.act_fn(ops.linear(x, *linear_parts(mlp.gate_proj))) * ops.linear(x, *linear_parts(mlp.up_proj))


def mlp_forward(mlp: Any, hidden_states: Tensor) -> Tensor:
    """An MLP, (..., D) to (..., D)."""
    if hasattr(mlp, _GATED[0]):
        return ops.linear(gated(mlp, hidden_states), *linear_parts(mlp.down_proj))
    return fused_mlp(mlp_parts(mlp), hidden_states)


def _why_not_attention(attn: Any) -> str | None:
    if _name(attn) not in _ATTENTIONS:
        return f"attention is {type(attn).__name__}"
    names = ("q_proj", "k_proj", "v_proj", "o_proj" if hasattr(attn, "o_proj") else "out_proj")
    if not all(hasattr(attn, name) for name in names):
        return f"{type(attn).__name__} of this version of transformers has no {', '.join(names)}"
    return next((why for name in names if (why := why_not_linear(name, getattr(attn, name)))), None)


def _why_not_mlp(mlp: Any) -> str | None:
    name = _name(mlp)
    if name in _GATED_MLPS:
        return next((why for n in _GATED if (why := why_not_linear(n, getattr(mlp, n)))), None)
    if name not in _MLPS:
        return f"MLP is {type(mlp).__name__}"
    fc1, fc2, act = ("fc1", "fc2", "activation_fn") if hasattr(mlp, "fc1") else ("up_proj", "down_proj", "act_fn")
    if not all(hasattr(mlp, each) for each in (fc1, fc2, act)):
        return f"{type(mlp).__name__} of this version of transformers has no {fc1}, {fc2}, {act}"
    if activation_name(getattr(mlp, act)) is None:
        return f"activation {type(getattr(mlp, act)).__name__} has no fused form"
    return why_not_linear(fc1, getattr(mlp, fc1)) or why_not_linear(fc2, getattr(mlp, fc2))


def _why_not_layer(family: Family, layer: Any, options: Options) -> str | None:
    if not (options.attention and options.layer_norm and options.mlp):
        return "attention, layer_norm and mlp are not all switched on, so its parts are fused one by one"
    needed = [name for name in vars(family).values() if name]
    missing = [name for name in needed if not hasattr(layer, name)]
    if missing:
        return f"{type(layer).__name__} of this version of transformers has no {', '.join(missing)}"
    for name in (family.norm1, family.norm2):
        reason = why_not_norm(getattr(layer, name))
        if reason:
            return f"{name}: {reason}"
    return _why_not_attention(getattr(layer, family.attention)) or _why_not_mlp(layer.mlp)


def attention_of(module: Any) -> Attended | None:
    """How to read the attention of an encoder layer."""
    family = _LAYERS.get(_name(module))
    if family is None or not (hasattr(module, family.norm1) and hasattr(module, family.attention)):
        return None
    if why_not_norm(getattr(module, family.norm1)) or _why_not_attention(getattr(module, family.attention)):
        return None
    return Attended(partial(norm_and_attention, family), partial(layer_call, family))


def norm_and_attention(family: Family, layer: Any) -> tuple[Norm, AttentionParts]:
    """Of an encoder layer, whatever its MLP is."""
    norm = getattr(layer, family.norm1)
    return (norm.weight, norm.bias, norm.eps), attention_parts(getattr(layer, family.attention))


def plan(module: Any, options: Options, parent: nn.Module | None = None) -> Plan | str | None:
    """How to fuse this module, why not, or None when it is none of transformers' ViT modules."""
    name = _name(module)
    if name in _LAYERS:
        family = _LAYERS[name]
        if reason := _why_not_layer(family, module, options):
            return reason
        forward, parts, call = partial(layer_forward, family), partial(layer_parts, family), partial(layer_call, family)
        if _name(module.mlp) in _GATED_MLPS:
            return Plan(forward, BRANCH_OPS, whole=True)
        return Plan(forward, BLOCK_OPS, whole=True, parts=parts, call=call)
    if name in _ATTENTIONS:
        reason = _why_not_attention(module) if options.attention else "attention=False"
        return reason or Plan(attention_module_forward, ("linear", "attention"), whole=True)
    if name in _MLPS or name in _GATED_MLPS:
        reason = _why_not_mlp(module) if options.mlp else "mlp=False"
        return reason or Plan(mlp_forward, ("linear",), whole=True)
    if getattr(parent, _PATCHES.get(_name(parent), ""), None) is module:
        return plan_patches(module, options)
    return None
