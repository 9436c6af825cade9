"""An op of a case as two functions of the same tensors: as timm's modules write it, and as fastvit does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_cases import STEM, STEM_GROUPS, OpCase

Tensors = dict[str, Tensor]

EPS = 1e-6
PER_IMAGE = ("qkv", "x", "residual", "image")  # their first axis is the image; all other tensors are parameters
FP64_CHUNK = 16  # images at a time in fp64


@dataclass(frozen=True)
class Call:
    """public: the function of fastvit.ops; it takes the tensors by the names in shapes, and the options beside them.

    eager takes the tensors by the same names. arrange: what the public function takes in place of these, if it has
    other arguments. steps: where no kernel computes the op whole, the calls that do it one by one, of those tensors.
    """

    public: str
    shapes: dict[str, tuple[int, ...]]
    eager: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    arrange: Callable[[Tensors], dict[str, Any]] = dict
    steps: Callable[[Tensors], list[tuple[str, dict[str, Any]]]] = lambda tensors: []

    def fused(self, **tensors: Tensor) -> Tensor:
        import fastvit

        return getattr(fastvit.ops, self.public)(**self.arrange(tensors), **self.options)

    def why_not(self, tensors: Tensors, backend: str) -> str | None:
        """Why a backend other than "auto" cannot run it, in one sentence, or None."""
        import fastvit

        reason = fastvit.ops.why_not(self.public, backend=backend, **self.arrange(tensors), **self.options)
        steps = self.steps(tensors) if reason is not None else []
        reasons = [fastvit.ops.why_not(public, backend=backend, **arguments) for public, arguments in steps]
        return next(filter(None, reasons), None) if steps else reason

    @property
    def wanted(self) -> tuple[str, ...]:
        """What a backward differentiates: everything but pixels."""
        return tuple(name for name in self.shapes if name != "image")


def call(case: OpCase) -> Call:
    """The functions of a case."""
    makers = {
        "attention": _attention,
        "layer_norm": _layer_norm,
        "group_norm": _group_norm,
        "norm_mlp": _norm_mlp,
        "patch_embed": _patch_embed,
        "block": _block,
    }
    return makers.get(case.op, _linear)(case)


def tensors(case: OpCase, device: torch.device, seed: int = 0) -> Tensors:
    """Seeded random tensors in the case's dtype; no weight is 1, no bias 0, and products keep unit gain."""
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, shape in call(case).shapes.items():
        noise = torch.randn(shape, generator=generator, device=device)
        if name.endswith("weight") and len(shape) > 1:
            noise *= noise[0].numel() ** -0.5
        elif name.endswith("weight"):
            noise = 1 + 0.2 * noise
        elif name not in PER_IMAGE:
            noise *= 0.2
        made[name] = noise.to(case.torch_dtype)
    return made


def upstream(output: Tensor, seed: int = 1) -> Tensor:
    """A seeded random gradient of the output."""
    generator = torch.Generator(output.device).manual_seed(seed)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


def run(function: Callable[..., Tensor], given: Tensors, wanted: tuple[str, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradient of each wanted tensor, which the caller has made a leaf."""
    output = function(**given)
    return output, *torch.autograd.grad(output, [given[name] for name in wanted], dy)


def leaves(given: Tensors, wanted: tuple[str, ...]) -> Tensors:
    """The same tensors, detached, the wanted ones requiring a gradient."""
    return {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in given.items()}


def exact(case: OpCase, given: Tensors, dy: Tensor | None) -> tuple[Tensor, ...]:
    """Output and, with dy, gradients by eager PyTorch in fp64 on the same rounded tensors, few images at a time.

    Images do not meet in any op, so outputs are joined and gradients of parameters summed.
    """
    chosen, parts = call(case), []
    parameters = {name: tensor.double() for name, tensor in given.items() if name not in PER_IMAGE}
    wanted = chosen.wanted if dy is not None else ()
    for start in range(0, case.batch, FP64_CHUNK):
        images = slice(start, start + FP64_CHUNK)
        chunk = {name: t[images].double() for name, t in given.items() if name in PER_IMAGE}
        both = leaves({name: {**chunk, **parameters}[name] for name in given}, wanted)
        if dy is None:
            with torch.no_grad():
                parts.append((chosen.eager(**both),))
        else:
            got = run(chosen.eager, both, wanted, dy[images].double())
            parts.append((got[0].detach(), *got[1:]))
    joined = [name in PER_IMAGE for name in ("x", *wanted)]  # the output has images as x has
    return tuple(
        torch.cat(column) if per_image else torch.stack(column).sum(0)
        for per_image, column in zip(joined, zip(*parts, strict=True), strict=True)
    )


def attend(case: OpCase, qkv: Tensor) -> Tensor:
    """PyTorch's attention of packed qkv (B, N, 3·D), as timm calls it: (B, N, D)."""
    images, tokens, _ = qkv.shape
    q, k, v = qkv.reshape(images, tokens, 3, case.heads, case.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, tokens, case.width)


def _attention(case: OpCase) -> Call:
    def eager(qkv: Tensor) -> Tensor:
        return attend(case, qkv)

    shapes = {"qkv": (case.batch, case.tokens, 3 * case.width)}
    return Call("attention_packed", shapes, eager, {"num_heads": case.heads})


def _layer_norm(case: OpCase) -> Call:
    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (case.width,), weight, bias, EPS)

    shapes = {"x": (case.batch, case.tokens, case.width), "weight": (case.width,), "bias": (case.width,)}
    return Call("layer_norm", shapes, eager, {"eps": EPS})


def _group_norm(case: OpCase) -> Call:
    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.group_norm(x, STEM_GROUPS, weight, bias, EPS))

    shapes = {"x": case.maps, "weight": (STEM,), "bias": (STEM,)}
    return Call("group_norm", shapes, eager, {"num_groups": STEM_GROUPS, "eps": EPS, "relu": True})


def _linear(case: OpCase) -> Call:
    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        y = F.gelu(y) if case.op == "linear_fc1" else y
        return y if residual is None else residual + y

    inputs, outputs = case.features
    shapes: dict[str, tuple[int, ...]] = {
        "x": (case.batch, case.tokens, inputs),
        "weight": (outputs, inputs),
        "bias": (outputs,),
    }
    if case.op in ("linear_proj", "linear_fc2"):
        shapes["residual"] = (case.batch, case.tokens, outputs)
    return Call("linear", shapes, eager, {"activation": "gelu"} if case.op == "linear_fc1" else {})


def _norm_mlp(case: OpCase) -> Call:
    def eager(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
    ) -> Tensor:
        hidden = F.gelu(F.linear(F.layer_norm(x, (case.width,), norm_weight, norm_bias, EPS), fc1_weight, fc1_bias))
        return x + F.linear(hidden, fc2_weight, fc2_bias)

    D, hidden_width = case.width, case.hidden
    shapes = {
        "x": (case.batch, case.tokens, D),
        "norm_weight": (D,),
        "norm_bias": (D,),
        "fc1_weight": (hidden_width, D),
        "fc1_bias": (hidden_width,),
        "fc2_weight": (D, hidden_width),
        "fc2_bias": (D,),
    }
    return Call("norm_mlp", shapes, eager, {"eps": EPS, "activation": "gelu"})


def _patch_embed(case: OpCase) -> Call:
    def eager(image: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix: Tensor) -> Tensor:
        patches = F.conv2d(image, weight, bias, stride=case.patch).flatten(2).transpose(1, 2)
        return torch.cat([prefix.expand(image.shape[0], -1, -1), patches], 1) + pos_embed

    positions = (case.side // case.patch) ** 2 + case.prefix
    shapes = {
        "image": (case.batch, case.channels, case.side, case.side),
        "weight": (case.width, case.channels, case.patch, case.patch),
        "bias": (case.width,),
        "pos_embed": (1, positions, case.width),
        "prefix": (1, case.prefix, case.width),
    }
    return Call("patch_embed", shapes, eager)


def _block(case: OpCase) -> Call:
    images, N, D, hidden_width = case.batch, case.tokens, case.width, case.hidden
    shapes = {
        "x": (images, N, D),
        "norm1_weight": (D,),
        "norm1_bias": (D,),
        "qkv_weight": (3 * D, D),
        "qkv_bias": (3 * D,),
        "proj_weight": (D, D),
        "proj_bias": (D,),
        "norm2_weight": (D,),
        "norm2_bias": (D,),
        "fc1_weight": (hidden_width, D),
        "fc1_bias": (hidden_width,),
        "fc2_weight": (D, hidden_width),
        "fc2_bias": (D,),
    }

    def eager(x: Tensor, **p: Tensor) -> Tensor:
        qkv = F.linear(F.layer_norm(x, (D,), p["norm1_weight"], p["norm1_bias"], EPS), p["qkv_weight"], p["qkv_bias"])
        x = x + F.linear(attend(case, qkv), p["proj_weight"], p["proj_bias"])
        normed = F.layer_norm(x, (D,), p["norm2_weight"], p["norm2_bias"], EPS)
        return x + F.linear(F.gelu(F.linear(normed, p["fc1_weight"], p["fc1_bias"])), p["fc2_weight"], p["fc2_bias"])

    def arrange(given: Tensors) -> dict[str, Any]:
        import fastvit

        parameters = {name: tensor for name, tensor in given.items() if name != "x"}
        block = fastvit.ops.EncoderBlock(
            **parameters, layer_scale1=None, layer_scale2=None, norm1_eps=EPS, norm2_eps=EPS
        )
        return {"x": given["x"], "blocks": [block]}

    def steps(given: Tensors) -> list[tuple[str, dict[str, Any]]]:
        x, p = given["x"], given
        qkv = {"qkv": x.new_empty(x.shape[0], N, 3 * D), "num_heads": case.heads}
        mlp_names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        norm2 = {"norm_weight": p["norm2_weight"], "norm_bias": p["norm2_bias"], "eps": EPS, "activation": "gelu"}
        return [
            ("layer_norm", {"x": x, "weight": p["norm1_weight"], "bias": p["norm1_bias"], "eps": EPS}),
            ("linear", {"x": x, "weight": p["qkv_weight"], "bias": p["qkv_bias"]}),
            ("attention_packed", qkv),
            ("linear", {"x": x, "weight": p["proj_weight"], "bias": p["proj_bias"], "residual": x}),
            ("norm_mlp", {"x": x, **{name: p[name] for name in mlp_names}, **norm2}),
        ]

    return Call("encoder", shapes, eager, {"num_heads": case.heads}, arrange, steps)
