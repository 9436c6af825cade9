"""Encoder blocks with random parameters, and what timm computes with them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import ops


def block(width: int, hidden: int, dtype=torch.float32, seed: int = 0, **absent: None) -> ops.EncoderBlock:
    """Parameters of a block, affine ones at random; those named in ``absent`` are None."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"qkv_weight": (3 * width, width), "qkv_bias": (3 * width,), "proj_weight": (width, width)}
    shapes |= {"fc1_weight": (hidden, width), "fc1_bias": (hidden,), "fc2_weight": (width, hidden)}
    made = {}
    for name in ops.EncoderBlock._fields[:14]:
        shape = shapes.get(name, (width,))
        noise = torch.randn(shape, generator=g)
        noise = noise / shape[1] ** 0.5 if len(shape) == 2 else noise * 0.3 + name.endswith(("weight", "scale1"))
        made[name] = nn.Parameter(noise.to(dtype), requires_grad=False)
    return ops.EncoderBlock(**{**made, **absent})._replace(norm1_eps=1e-6, norm2_eps=1e-5)


def eager(x: Tensor, blocks: list[ops.EncoderBlock], heads: int, activation: str = "gelu", linear=F.linear) -> Tensor:
    """The same blocks as timm computes them."""
    act = {
        "none": lambda t: t,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    }[activation]
    for b in blocks:
        b = ops.EncoderBlock(*[t.to(x.dtype) if isinstance(t, Tensor) else t for t in b])
        norm = F.layer_norm(x, x.shape[-1:], b.norm1_weight, b.norm1_bias, b.norm1_eps)
        q, k, v = linear(norm, b.qkv_weight, b.qkv_bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        heads_out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        branch = linear(heads_out, b.proj_weight, b.proj_bias)
        x = x + (branch if b.layer_scale1 is None else b.layer_scale1 * branch)
        norm = F.layer_norm(x, x.shape[-1:], b.norm2_weight, b.norm2_bias, b.norm2_eps)
        branch = linear(act(linear(norm, b.fc1_weight, b.fc1_bias)), b.fc2_weight, b.fc2_bias)
        x = x + (branch if b.layer_scale2 is None else b.layer_scale2 * branch)
    return x
