"""transformers: ViT and DeiT, DINOv2, CLIP and SigLIP towers.

Version 5 renamed the parts of a block in memory and still writes the names of before, so both are layouts.
"""

from dataclasses import replace

from .layout import Layout, Rule, rules

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_QKV_ON_DISK = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_TEXT = (
    *("text_model.", "text_projection", "logit_scale", "logit_bias", "language_model.", "multi_modal_projector."),
    *("model.language_model.", "model.multi_modal_projector.", "lm_head."),
)


def _each(block: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(block + name for name in names)


def _embeddings() -> dict[str, str | tuple[str, ...]]:
    return {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "mask_token": "embeddings.mask_token",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }


def _vit(block: str, qkv: tuple[str, ...], proj: str, fc1: str, fc2: str) -> tuple[Rule, ...]:
    return rules(
        {
            **_embeddings(),
            "dist_token": "embeddings.distillation_token",
            "blocks.{}.norm1": block + "layernorm_before",
            "blocks.{}.attn.qkv": _each(block, qkv),
            "blocks.{}.attn.proj": block + proj,
            "blocks.{}.norm2": block + "layernorm_after",
            "blocks.{}.mlp.fc1": block + fc1,
            "blocks.{}.mlp.fc2": block + fc2,
            "pre_logits.fc": "pooler.dense",
            "head_dist": "^distillation_classifier",
        },
        Rule(("head",), ("^cls_classifier",), needs="head_dist.weight"),
        Rule(("head",), ("^classifier",)),
    )


VIT = Layout(
    name="transformers ViT or DeiT",
    src="transformers",
    markers=("embeddings.patch_embeddings.projection.weight", "layers.0.attention.q_proj.weight"),
    rules=_vit("layers.{}.", _QKV, "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    resize="transformers",
    others=("decoder.",),  # of MAE
)
VIT_ON_DISK = replace(
    VIT,
    name="transformers ViT or DeiT, as on disk",
    markers=("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.intermediate.dense.weight"),
    rules=_vit("encoder.layer.{}.", _QKV_ON_DISK, "attention.output.dense", "intermediate.dense", "output.dense"),
)


def _dinov2(qkv: tuple[str, ...], proj: str, swiglu: tuple[str, ...], down: str) -> tuple[Rule, ...]:
    block = "encoder.layer.{}."
    return rules(
        {
            **_embeddings(),
            "reg_token": "embeddings.register_tokens",
            "blocks.{}.norm1": block + "norm1",
            "blocks.{}.attn.qkv": _each(block, qkv),
            "blocks.{}.attn.proj": block + proj,
            "blocks.{}.ls1.gamma": block + "layer_scale1.lambda1",
            "blocks.{}.norm2": block + "norm2",
            "blocks.{}.ls2.gamma": block + "layer_scale2.lambda1",
        },
        Rule(("blocks.{}.mlp.fc1",), (block + "mlp.fc1",), gated=False),
        Rule(("blocks.{}.mlp.fc2",), (block + "mlp.fc2",), gated=False),
        Rule(("blocks.{}.mlp.fc1",), _each(block, swiglu), gated=True),
        Rule(("blocks.{}.mlp.fc2",), (block + down,), gated=True),
        # of the class token and the mean patch, which no other library has
        Rule(("head",), ("^classifier",), wanted_only=True),
    )


DINOV2 = Layout(
    name="transformers DINOv2",
    src="transformers",
    markers=("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.attention.q_proj.weight"),
    rules=_dinov2(_QKV, "attention.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    resize="transformers",
)
DINOV2_ON_DISK = replace(
    DINOV2,
    name="transformers DINOv2, as on disk",
    markers=(
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.norm1.weight",
        "encoder.layer.0.attention.attention.query.weight",
    ),
    rules=_dinov2(_QKV_ON_DISK, "attention.output.dense", ("mlp.weights_in",), "mlp.weights_out"),
)

_BLOCK = "encoder.layers.{}."

CLIP = Layout(
    name="transformers CLIP or SigLIP tower",
    src="transformers",
    markers=("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    rules=rules(
        {
            "patch_embed.proj": "embeddings.patch_embedding",
            "norm_pre": "pre_layrnorm",
            "blocks.{}.norm1": _BLOCK + "layer_norm1",
            "blocks.{}.attn.qkv": _each(_BLOCK, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            "blocks.{}.attn.proj": _BLOCK + "self_attn.out_proj",
            "blocks.{}.norm2": _BLOCK + "layer_norm2",
            "blocks.{}.mlp.fc1": _BLOCK + "mlp.fc1",
            "blocks.{}.mlp.fc2": _BLOCK + "mlp.fc2",
            "norm": "post_layernorm",
            "attn_pool.latent": "head.probe",
            "attn_pool.proj": "head.attention.out_proj",
            "attn_pool.norm": "head.layernorm",
            "attn_pool.mlp.fc1": "head.mlp.fc1",
            "attn_pool.mlp.fc2": "head.mlp.fc2",
        },
        Rule(("attn_pool.q", "attn_pool.kv"), ("head.attention.in_proj_",), timm_shares=(1, 2), shares=(3,)),
        Rule(("cls_token",), ("embeddings.class_embedding",), view="token"),
        Rule(("pos_embed",), ("embeddings.position_embedding.weight",), view="table"),
        Rule(("head",), ("^visual_projection",), biasless=True),
    ),
    resize="transformers",
    others=_TEXT,
)
