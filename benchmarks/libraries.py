"""transformers' and torchvision's own Vision Transformers with the weights of timm's, as they come and accelerated."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from . import measure, peers


class Logits(nn.Module):
    """A transformers classifier that answers with its logits, as the other libraries' do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def transformers(model: nn.Module) -> nn.Module:
    """ViTForImageClassification with SDPA, its default, and the weights of a plain timm model."""
    import transformers as library

    import fastvit

    height, width = model.patch_embed.img_size
    config = library.ViTConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        intermediate_size=model.blocks[0].mlp.fc1.out_features,
        layer_norm_eps=model.norm.eps,
        image_size=height if height == width else (height, width),
        patch_size=model.patch_embed.patch_size[0],
        num_labels=model.num_classes,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        other = library.ViTForImageClassification(config)
    weights = fastvit.convert_state_dict(model.state_dict(), src="timm", dst="transformers")
    other.load_state_dict(weights, assign=True)
    return Logits(other)


def torchvision(model: nn.Module) -> nn.Module:
    """VisionTransformer with the weights of a plain timm model."""
    if (reason := peers.repair_torchvision()) is not None:
        raise ImportError(reason)
    from torchvision.models import VisionTransformer

    import fastvit

    height, width = model.patch_embed.img_size
    if height != width:
        raise ValueError(f"torchvision takes square images, not {height} x {width}")
    other = VisionTransformer(
        image_size=height,
        patch_size=model.patch_embed.patch_size[0],
        num_layers=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        hidden_dim=model.embed_dim,
        mlp_dim=model.blocks[0].mlp.fc1.out_features,
        num_classes=model.num_classes,
    )
    weights = fastvit.convert_state_dict(model.state_dict(), src="timm", dst="torchvision")
    other.load_state_dict(weights, assign=True)
    return other


LIBRARIES: dict[str, Callable[[nn.Module], nn.Module]] = {"transformers": transformers, "torchvision": torchvision}


def build(name: str, model: nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    """The library's model as it comes, and accelerated; weights and memory are those of the timm model."""
    import fastvit

    plain, fused = (LIBRARIES[name](model).eval() for _ in range(2))
    fastvit.accelerate(fused)
    return [
        measure.Provider(name, functools.partial(plain, batch)),
        measure.Provider(
            f"fastvit-{name}", functools.partial(fused, batch), functools.partial(fastvit.backend, "auto")
        ),
    ]
