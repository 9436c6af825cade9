"""One small call of every public op, for what ops owe whatever they compute."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from harness import Place, places, random_like
from torch import Tensor

import fastvit
from fastvit import ops

PUBLIC = list(ops._PUBLIC)
Shapes = dict[str, tuple[int, ...]]
NORM: Shapes = {"x": (2, 5, 16), "weight": (16,), "bias": (16,)}
MLP: Shapes = {
    "x": (2, 5, 16),
    "norm_weight": (16,),
    "norm_bias": (16,),
    "fc1_weight": (24, 16),
    "fc1_bias": (24,),
    "fc2_weight": (16, 24),
    "fc2_bias": (16,),
    "layer_scale": (16,),
}
PATCHES: Shapes = {
    "image": (2, 3, 8, 8),
    "weight": (16, 3, 4, 4),
    "bias": (16,),
    "pos_embed": (1, 5, 16),
    "prefix": (1, 1, 16),
}
ENCODER: Shapes = {
    "x": (2, 5, 16),
    **dict.fromkeys(ops.EncoderBlock._fields[:14], (16,)),
    "qkv_weight": (48, 16),
    "qkv_bias": (48,),
    "proj_weight": (16, 16),
    "fc1_weight": (24, 16),
    "fc1_bias": (24,),
    "fc2_weight": (16, 24),
}
HEADS: Shapes = dict.fromkeys("qkv", (2, 2, 5, 8))


def _varlen(qkv: Tensor, **options: float) -> Tensor:
    ends = torch.tensor([0, 2, 2, 7], dtype=torch.int32, device=qkv.device)
    return ops.attention_varlen(qkv, ends, 5, 2, **options)


# public function -> call of keyword tensors, and their shapes; an op that is missing here fails by its name
CALLS: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "add_layer_norm": (
        lambda **t: torch.cat(ops.add_layer_norm(**t)),
        {**NORM, "residual": (2, 5, 16), "layer_scale": (16,)},
    ),
    "attention": (ops.attention, HEADS),
    "attention_packed": (lambda qkv, **options: ops.attention_packed(qkv, 2, **options), {"qkv": (2, 5, 48)}),
    "attention_varlen": (_varlen, {"qkv": (7, 48)}),
    "encoder": (lambda x, **block: ops.encoder(x, [ops.EncoderBlock(**block)], 2), ENCODER),
    "group_norm": (
        lambda **t: ops.group_norm(t["x"], 2, t["weight"], t["bias"], relu=True),
        {**NORM, "x": (2, 16, 5)},
    ),
    "layer_norm": (ops.layer_norm, NORM),
    "linear": (
        lambda **t: ops.linear(**t, activation="gelu"),
        {"x": (2, 5, 16), "weight": (24, 16), "bias": (24,), "layer_scale": (24,), "residual": (2, 5, 24)},
    ),
    "norm_mlp": (ops.norm_mlp, MLP),
    "patch_embed": (ops.patch_embed, PATCHES),
}


@dataclass(frozen=True)
class Call:
    """A public op's call at a place: run(tensors) gives one tensor that depends on all of them."""

    name: str
    place: Place

    def __str__(self) -> str:
        return f"{self.name}-{self.place}"

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Leaves that want gradients, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        shapes = CALLS[self.name][1]
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {name: t.to(self.place.device).requires_grad_() for name, t in made.items()}

    def function(self, **tensors: Tensor) -> Tensor:
        """On whatever backend is in force."""
        return CALLS[self.name][0](**tensors)

    def run(self, tensors: dict[str, Tensor], **options: float) -> Tensor:
        with fastvit.backend(self.place.backend):
            return CALLS[self.name][0](**tensors, **options)

    def gradients(self, tensors: dict[str, Tensor], output: Tensor) -> tuple[Tensor, ...]:
        """Of every tensor, for an incoming gradient that is random and always the same."""
        incoming = random_like(output).to(output.dtype).to(output.device)
        return torch.autograd.grad(output, list(tensors.values()), incoming)


def calls() -> list:
    """Every public op at every place that serves it, as parameters; a place absent here is skipped with its reason."""
    return [
        pytest.param(Call(name, place.values[0]), id=f"{name}-{place.id}", marks=place.marks)
        for name in PUBLIC
        for place in places(ops._PUBLIC[name][0])
    ]
