"""Tiny models of the three libraries with random weights, for the tests of checkpoints."""

import warnings

import pytest
import torch
from models import randomize, timm
from torch import nn

transformers = pytest.importorskip("transformers")
vision = pytest.importorskip("torchvision.models.vision_transformer")

HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
DINO = {"mlp_ratio": 2, **{key: value for key, value in HF.items() if key != "intermediate_size"}}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
VT = timm.models.vision_transformer.VisionTransformer


def timm_vit(**options) -> nn.Module:
    return randomize(VT(**{**TIMM, "num_classes": 5, **options})).eval()


def hf(kind: str, **options) -> nn.Module:
    """ViTForImageClassification and such, by name, with random weights."""
    made = getattr(transformers, kind)
    size = DINO if kind.startswith("Dinov2") else HF
    return randomize(made(made.config_class(**{**size, **options}))).eval()


def tv_vit(**options) -> nn.Module:
    made = vision.VisionTransformer(**{**TV, **options})
    return randomize(made).eval()


TV = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 48,
    "mlp_dim": 96,
    "num_classes": 5,
}


def save_hf(model: nn.Module, folder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


@torch.no_grad()
def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits, or the pooled features of a tower."""
    found = model(x)
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return found
