"""timm's own names, which DeiT and DINOv2 were released under too, but for a few."""

from .layout import Layout, Rule, rules

# open_clip keeps a timm tower below visual.trunk and its projection beside it.
TIMM = Layout(
    name="timm (also the original DeiT, DINOv2, MAE and open_clip's timm towers)",
    src="timm",
    markers=("patch_embed.proj.weight",),
    rules=rules(
        {
            "reg_token": "register_tokens",
            "blocks.{}.mlp.fc1": "blocks.{}.mlp.w12",
            "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3",
            "blocks.{}.ls1.gamma": "blocks.{}.gamma_1",
            "blocks.{}.ls2.gamma": "blocks.{}.gamma_2",
        },
        Rule(("head",), ("^visual.head.proj",), biasless=True),
    ),
    resize="timm",
    others=("text.", "logit_scale", "logit_bias", "decoder_"),
    passthrough=True,
)
