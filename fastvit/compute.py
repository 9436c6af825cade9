"""How much a model computes for one image, counted on shapes without storage; the paper's models compared.

A multiply-add (MAC) of a matrix product or a convolution counts once, the two products of attention included; the rest
(norms, activations, softmax) counts nothing, as in the figures that papers print. FLOPs are twice that.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends import backend
from .config import PRESETS
from .model import create_model

FAMILIES = ("ResNet", "hybrid", "ViT")
SIZE = 224

# The paper's ResNets (table 6): label -> blocks of each stage, and how much wider than a ResNet
_RESNETS = {
    "R50x1": ((3, 4, 6, 3), 1),
    "R50x2": ((3, 4, 6, 3), 2),
    "R101x1": ((3, 4, 23, 3), 1),
    "R152x1": ((3, 8, 36, 3), 1),
    "R152x2": ((3, 8, 36, 3), 2),
    "R200x3": ((3, 24, 36, 3), 3),
}
# label -> the name that timm gave it
_HYBRIDS = {
    "R26+S/32": "vit_small_r26_s32_224",
    "R50+B/16": "vit_base_r50_s16_224",
    "R50+L/32": "vit_large_r50_s32_224",
}
_VITS = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/32": "vit_base_patch32_224",
    "B/16": "vit_base_patch16_224",
    "L/32": "vit_large_patch32_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}
PAPERS = len(_RESNETS) + len(_HYBRIDS) + len(_VITS)  # how many papers_rows gives


@dataclass(frozen=True)
class Row:
    """A model and its cost: parameters, and multiply-adds of one image (height, width); ``asked``: the reader's own."""

    name: str
    family: str
    height: int
    width: int
    parameters: int
    macs: int
    asked: bool = False

    @property
    def gmacs(self) -> float:
        """Billions of multiply-adds for one image."""
        return self.macs / 1e9


def macs(model: nn.Module, x: Tensor | Mapping[str, Any]) -> int:
    """Multiply-adds of one forward pass, without computing it: parameters and input are replaced by empty shapes.

    The model is left as it is: its mode, its device and its numbers play no part.

    Args:
        model: any module whose forward needs shapes alone.
        x: its input, images (B, C, height, width), or a mapping that is called as ``model(**x)``.

    Raises:
        ValueError: the forward looks at values, or at tensors that are neither parameters nor buffers.
    """
    from torch.utils.flop_counter import FlopCounterMode

    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
    given = {name: _shape(value) for name, value in x.items()} if isinstance(x, Mapping) else {}
    args = () if isinstance(x, Mapping) else (_shape(x),)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), backend("reference"), counter:
            torch.func.functional_call(model, shapes, args, given)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        why = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"fastvit.compute: {type(model).__name__} cannot run on shapes alone: {why}") from None
    return counter.get_total_flops() // 2


def _shape(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def row(
    name: str, family: str, model: nn.Module, x: Tensor | Mapping[str, Any] | None = None, asked: bool = False
) -> Row:
    """The cost of a model for one image x (1, C, height, width), which is (1, 3, 224, 224) if it is not given.

    Raises:
        ValueError: what :func:`macs` raises.
    """
    if x is None:
        x = torch.empty(1, 3, SIZE, SIZE, device="meta")
    image = next(iter(x.values())) if isinstance(x, Mapping) else x
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = image.shape[-2:]
    return Row(name, family, height, width, parameters, macs(model, x), asked)


def papers_rows(timm: Any = None) -> Iterator[Row | tuple[str, str]]:
    """The ResNets, hybrids and Vision Transformers of the paper (tables 1 and 6) at 224 x 224, 1000 classes.

    Args:
        timm: the module, which has the architectures that are not fastvit's; None without it.

    Returns:
        For each one a :class:`Row`, or its label and why it is left out.
    """
    builders: list[tuple[str, str, Callable[[], nn.Module] | None]] = [
        *((label, "ResNet", timm and functools.partial(_resnet, timm, *shape)) for label, shape in _RESNETS.items()),
        *((label, "hybrid", _named(name, timm)) for label, name in _HYBRIDS.items()),
        *((label, "ViT", _named(name, timm)) for label, name in _VITS.items()),
    ]
    for label, family, build in builders:
        if build is None:
            yield label, "needs timm, whose architecture it is"
            continue
        with torch.device("meta"):
            model = build().eval()
        yield row(label, family, model)


def _resnet(timm: Any, layers: tuple[int, ...], width: int) -> nn.Module:
    """A BiT ResNet: pre-activation, GroupNorm, standardised weights."""
    convolution = functools.partial(timm.layers.StdConv2d, eps=1e-8)
    return timm.models.resnetv2.ResNetV2(layers, width_factor=width, stem_type="fixed", conv_layer=convolution)


def _named(name: str, timm: Any) -> Callable[[], nn.Module] | None:
    if name in PRESETS:
        return functools.partial(create_model, name, weight_init="skip")
    return functools.partial(timm.create_model, name) if timm else None
