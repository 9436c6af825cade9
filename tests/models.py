"""Models with random weights, the yardstick of the model and drop-in tests."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

LAYER_SCALES = {"gamma", "gamma_1", "gamma_2", "lambda1", "lambda_1", "lambda_2"}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter, affine ones and tokens included: nothing stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if "norm" in type(m).__name__.lower() and hasattr(m, "weight")}

    def randn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "weight" in name:
                fan_in = parameter[0].numel()
                parameter.copy_(randn(parameter) / fan_in**0.5)
            elif id(parameter) in norms or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.2 * randn(parameter))
            elif name.rpartition(".")[2] in LAYER_SCALES:
                parameter.copy_(0.5 + 0.2 * randn(parameter))
            else:
                parameter.copy_(0.2 * randn(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * randn(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.2 * randn(buffer).abs())
    return model


def timm_model(name: str, **options: Any) -> nn.Module:
    return randomize(timm.create_model(name, **options)).eval()


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 11}


def small_timm(**options: Any) -> nn.Module:
    """A timm VisionTransformer that takes milliseconds."""
    return randomize(timm.models.vision_transformer.VisionTransformer(**{**SMALL, **options})).eval()


def images(batch: int = 2, side: int = 32, channels: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))
