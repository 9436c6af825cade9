"""Tiny models of the three libraries with random weights, for the tests of checkpoints."""

import warnings

import pytest
import safetensors.torch
import torch
from models import randomize, timm
from torch import nn

import fastvit

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


CLIP = {"pre_norm": True, "norm_layer": nn.LayerNorm}
REGISTERS = {"init_values": 0.1, "num_classes": 0, "reg_tokens": 4, "no_embed_class": True}


def ours(**options):
    return randomize(fastvit.VisionTransformer(**{**TIMM, "num_classes": 5, **options}), seed=8).eval()


def distilled(**options):
    options = {**TIMM, "num_classes": 5, **options}
    return randomize(timm.create_model("deit_tiny_distilled_patch16_224", **options)).eval()


def clip_with_head():
    model = timm_vit(num_classes=20, **CLIP)
    nn.init.zeros_(model.head.bias)
    return model


def vit_hf(**options):
    return hf("ViTForImageClassification", num_labels=5, **options)


class Tokens(nn.Module):
    """A transformers model as its class token's features."""

    def __init__(self, kind, **options):
        super().__init__()
        self.model = randomize(kind(kind.config_class(**HF), **options)).eval()

    def forward(self, x):
        return self.model(x).last_hidden_state[:, 0]


def inner(model):
    return model.model if isinstance(model, Tokens) else model


def write(model, folder):
    """A file as the model's own library writes it."""
    if hasattr(inner(model), "save_pretrained"):
        save_hf(inner(model), folder)
        return folder
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def with_gate() -> nn.Module:
    """DINOv2's giant model has a gated MLP."""
    gate = {"mlp_ratio": 8 / 3, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    return timm_vit(init_values=0.1, num_classes=0, **gate)
