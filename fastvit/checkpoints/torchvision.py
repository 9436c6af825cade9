"""torchvision's vit_b_16 and its siblings."""

from .layout import Layout, rules

_BLOCK = "encoder.layers.encoder_layer_{}."

TORCHVISION = Layout(
    name="torchvision",
    src="torchvision",
    markers=("conv_proj.weight", "encoder.pos_embedding"),
    rules=rules(
        {
            "cls_token": "class_token",
            "pos_embed": "encoder.pos_embedding",
            "patch_embed.proj": "conv_proj",
            "blocks.{}.norm1": _BLOCK + "ln_1",
            "blocks.{}.attn.qkv": _BLOCK + "self_attention.in_proj_",
            "blocks.{}.attn.proj": _BLOCK + "self_attention.out_proj",
            "blocks.{}.norm2": _BLOCK + "ln_2",
            "blocks.{}.mlp.fc1": _BLOCK + "mlp.0",
            "blocks.{}.mlp.fc2": _BLOCK + "mlp.3",
            "norm": "encoder.ln",
            "pre_logits.fc": "heads.pre_logits",
            "head": "heads.head",
        }
    ),
    resize="torchvision",
)
