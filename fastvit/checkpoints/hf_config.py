"""The config.json with which transformers builds a model for converted weights."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import PRESETS
from .error import CheckpointError, shape_of

# heads of the published models, whose weights do not tell: by width D
HEADS_OF_WIDTH = {c.embed_dim: c.num_heads for c in PRESETS.values()} | {
    512: 8,
    640: 10,
    896: 14,
    1152: 16,
    1536: 24,
}
NEEDED = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
# what transformers calls the activations of Vision Transformers
HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
# flax.linen.gelu is the tanh form; OpenAI's is x·σ(1.702 x)
ACTIVATIONS = {"npz": "gelu_pytorch_tanh", "openai": "quick_gelu"}


def hf_config(
    hub: Mapping[str, Tensor],
    headers: Mapping[str, Tensor],
    library: str,
    config: Mapping[str, Any] | None,
    num_heads: int | None,
    activation: str | None,
) -> dict[str, Any]:
    """Settings of the transformers model that holds these weights.

    Args:
        hub: the weights under timm's names. headers: the source's own names and shapes. library: where it comes from.
        config: a config.json that lay beside the source.
        num_heads, activation: what the caller knows better.

    Raises:
        CheckpointError: transformers has no such model, or the number of heads is not known.
    """
    _require_whole(hub)
    kind, architecture, eps = _kind(hub, library)
    own = _settings(config) if config and library == "transformers" else {}
    weight = hub["patch_embed.proj.weight"]
    width, channels, *patch = shape_of(weight)
    depth = len({name.split(".")[1] for name in hub if name.startswith("blocks.")})
    fc2 = hub["blocks.0.mlp.fc2.weight"]
    heads = num_heads or own.get("num_attention_heads") or _heads(headers, width)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(f"fastvit: num_heads must be a divisor of the width {width}, got {heads!r}")
    side = _side(hub, own, kind)
    found: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": side * patch[0],
        "patch_size": patch[0],
        "num_channels": channels,
        "hidden_act": activation or own.get("hidden_act") or _activation(kind, library),
        "layer_norm_eps": own.get("layer_norm_eps", eps),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    if patch[0] != patch[1]:
        raise CheckpointError(f"fastvit: transformers wants square patches, got {tuple(patch)}")
    if kind.startswith("dinov2"):
        gated = shape_of(hub["blocks.0.mlp.fc1.weight"])[0] == 2 * shape_of(fc2)[1]
        found |= {"mlp_ratio": _ratio(width, shape_of(fc2)[1], gated), "use_swiglu_ffn": gated}
    else:
        found["intermediate_size"] = shape_of(fc2)[1]
    if kind in ("vit", "deit") or kind.startswith("dinov2"):
        found["qkv_bias"] = "blocks.0.attn.qkv.bias" in hub
    if "reg_token" in hub:
        found["num_register_tokens"] = shape_of(hub["reg_token"])[1]
    if "head.weight" in hub:
        found |= _labels(hub, own, kind)
    if "pre_logits.fc.weight" in hub:
        found["pooler_output_size"] = shape_of(hub["pre_logits.fc.weight"])[0]
    return found


def _require_whole(hub: Mapping[str, Tensor]) -> None:
    """Every block has what the first one has."""
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in hub.items():
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            blocks.setdefault(number, {})[part] = shape_of(tensor)
    missing = [name for name in ("pos_embed", "norm.weight", "norm.bias", *NEEDED) if name not in hub]
    if missing:
        raise CheckpointError(f"fastvit: {missing[0]} is missing (timm's name)")
    for number, parts in blocks.items():
        if parts != blocks["0"]:
            raise CheckpointError(f"fastvit: block {number} has other parts or shapes than block 0")


def _kind(hub: Mapping[str, Tensor], library: str) -> tuple[str, str, float]:
    """model_type, class and eps."""
    headed = "head.weight" in hub
    if "fc_norm.weight" in hub or any(".attn.q_norm." in name or "backbone" in name for name in hub):
        raise CheckpointError("fastvit: transformers has no Vision Transformer with fc_norm, qk_norm or a hybrid stem")
    if "attn_pool.latent" in hub:
        return "siglip_vision_model", "SiglipVisionModel", 1e-6
    if "norm_pre.weight" in hub:
        return "clip_vision_model", "CLIPVisionModelWithProjection" if headed else "CLIPVisionModel", 1e-5
    if "reg_token" in hub:
        return "dinov2_with_registers", "Dinov2WithRegistersModel", 1e-6
    if "blocks.0.ls1.gamma" in hub:
        return "dinov2", "Dinov2Model", 1e-6
    if "cls_token" not in hub:
        raise CheckpointError("fastvit: transformers has no ViT without a class token")
    if headed and "pre_logits.fc.weight" in hub:
        raise CheckpointError("fastvit: transformers' ViTForImageClassification has no pre_logits before the head")
    eps = 1e-12 if library == "transformers" else 1e-6
    if "dist_token" in hub:
        return "deit", "DeiTForImageClassificationWithTeacher" if headed else "DeiTModel", eps
    return "vit", "ViTForImageClassification" if headed else "ViTModel", eps


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the image tower."""
    vision = config.get("vision_config")
    return dict(vision) if isinstance(vision, dict) else dict(config)


def _activation(kind: str, library: str) -> str:
    if library == "transformers" and kind in ("clip_vision_model", "siglip_vision_model"):
        return "quick_gelu" if kind.startswith("clip") else "gelu_pytorch_tanh"
    return ACTIVATIONS.get(library, "gelu")


def _heads(headers: Mapping[str, Tensor], width: int) -> int:
    for name, tensor in headers.items():
        if name.endswith("/query/kernel") and tensor.dim() >= 3 and "MAPHead" not in name:
            return int(tensor.shape[-2])
    if width not in HEADS_OF_WIDTH:
        raise CheckpointError(f"fastvit: no published model is {width} wide; say num_heads")
    return HEADS_OF_WIDTH[width]


def _side(hub: Mapping[str, Tensor], own: Mapping[str, Any], kind: str) -> int:
    """Patches along one side of the image."""
    rows = shape_of(hub["pos_embed"])[1]
    prefix = sum(name in hub for name in ("cls_token", "dist_token")) if "reg_token" not in hub else 0
    side = math.isqrt(rows - prefix)
    if side * side != rows - prefix:
        raise CheckpointError(f"fastvit: transformers wants square images, the position table has {rows} rows")
    return side


def _ratio(width: int, hidden: int, gated: bool) -> int:
    """mlp_ratio, of which a gated MLP takes two thirds, rounded up to 8 channels."""
    for ratio in range(1, 17):
        made = (width * ratio * 2 // 3 + 7) // 8 * 8 if gated else width * ratio
        if made == hidden:
            return ratio
    raise CheckpointError(f"fastvit: transformers' DINOv2 has no MLP of {hidden} channels at width {width}")


def _labels(hub: Mapping[str, Tensor], own: Mapping[str, Any], kind: str) -> dict[str, Any]:
    classes = shape_of(hub["head.weight"])[0]
    if kind == "clip_vision_model":
        return {"projection_dim": classes}
    names = own.get("id2label")
    if not isinstance(names, dict) or len(names) != classes:
        names = {str(i): f"LABEL_{i}" for i in range(classes)}
    return {"id2label": names, "label2id": {str(name): int(i) for i, name in names.items()}}
