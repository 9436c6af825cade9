"""The image tower of CLIP under the names of OpenAI and open_clip."""

from .layout import Layout, Rule, rules

_BLOCK = "transformer.resblocks.{}."

OPENAI = Layout(
    name="OpenAI's CLIP",
    src="openai",
    markers=("conv1.weight", "class_embedding", "ln_pre.weight"),
    rules=rules(
        {
            "patch_embed.proj": "conv1",
            "norm_pre": "ln_pre",
            "blocks.{}.norm1": _BLOCK + "ln_1",
            "blocks.{}.attn.qkv": _BLOCK + "attn.in_proj_",
            "blocks.{}.attn.proj": _BLOCK + "attn.out_proj",
            "blocks.{}.norm2": _BLOCK + "ln_2",
            "blocks.{}.mlp.fc1": _BLOCK + "mlp.c_fc",
            "blocks.{}.mlp.fc2": _BLOCK + "mlp.c_proj",
            "norm": "ln_post",
        },
        Rule(("cls_token",), ("class_embedding",), view="token"),
        Rule(("pos_embed",), ("positional_embedding",), view="table"),
        Rule(("head.weight",), ("proj",), view="transposed", biasless=True),
    ),
    resize="timm",
    others=(
        *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale"),
        *("input_resolution", "context_length", "vocab_size"),
    ),
)
