"""Every CUDA C++ kernel on small tensors of odd sizes, for compute-sanitizer to watch: `make gpu ARGS=--sanitize`.

    python tests/cuda_smoke.py

Results are not compared here (tests/test_cuda_*.py do), but two runs must agree to the bit.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from blocks import block
from torch import Tensor

import fastvit
from fastvit import ops

LOW = (torch.float16, torch.bfloat16)
Random = Callable[..., Tensor]
Call = Callable[[Random], Tensor]
HEADS = ((2, 50, 3, 64), (1, 197, 2, 64), (1, 33, 2, 80), (1, 600, 1, 128))  # batch, tokens, heads, head dim


def normalise(rows: int, width: int) -> Call:
    def call(random: Random) -> Tensor:
        x, residual = random(rows, width), random(rows, width)
        scale, weight, bias = random(width), random(width), random(width)
        y, z = ops.add_layer_norm(x, residual, weight, bias, layer_scale=scale, drop_path=0.3)
        return y * z

    return call


def mlp(random: Random) -> Tensor:
    x, weight1, bias1, weight2, bias2, scale = (
        random(*shape) for shape in ((7, 40), (72, 40), (72,), (40, 72), (40,), (40,))
    )
    return ops.norm_mlp(x, scale, bias2, weight1, bias1, weight2, bias2, layer_scale=scale, drop_path=0.2)


def patches(random: Random) -> Tensor:
    weight, positions, prefix = random(24, 3, 14, 14), random(7, 24), random(1, 24)
    image = torch.randint(0, 256, (2, 3, 28, 42), device=weight.device, dtype=torch.uint8)
    return ops.patch_embed(image, weight, None, positions, prefix, mean=(0.5,) * 3, std=(0.2, 0.3, 0.4))


def attend(batch: int, tokens: int, heads: int, head_dim: int, kind: str) -> Call:
    def call(random: Random) -> Tensor:
        qkv = random(batch, tokens, 3 * heads * head_dim)
        mask = torch.rand(tokens, tokens, device=qkv.device) > 0.3 if kind == "masked" else None
        return ops.attention_packed(qkv, heads, mask=mask, causal=kind == "causal")

    return call


def encode(random: Random) -> Tensor:
    x = random(2, 19, 64).detach()
    parameters = [t.to(x.device) if isinstance(t, Tensor) else t for t in block(64, 128, x.dtype)]
    return ops.encoder(x, [ops.EncoderBlock(*parameters)], 2)


def calls() -> Iterator[tuple[str, torch.dtype, Call]]:
    for dtype in (*LOW, torch.float32):
        for rows, width in ((3, 59), (5, 768), (2, 1023), (3, 1152), (2, 3001)):
            yield f"layer_norm {rows} x {width}", dtype, normalise(rows, width)
        yield "norm_mlp", dtype, mlp
        yield "patch_embed", dtype, patches
    for dtype in LOW:
        for shape in HEADS:
            for kind in ("plain", "causal", "masked"):
                yield f"attention {kind} {shape}", dtype, attend(*shape, kind)
        yield "encoder", dtype, encode


def differentiate(call: Call, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The result and the gradient of every tensor drawn, the same numbers each time."""
    torch.manual_seed(0)
    leaves: list[Tensor] = []

    def random(*shape: int) -> Tensor:
        leaves.append(torch.randn(shape, device=device, dtype=dtype).requires_grad_())
        return leaves[-1]

    y = call(random)
    if not y.requires_grad:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn_like(y))]


def run(device: str) -> int:
    """How many calls were made, each twice."""
    cases = [*calls()]
    with fastvit.backend("cuda"):
        for name, dtype, call in cases:
            first, second = (differentiate(call, dtype, device) for _ in range(2))
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                raise SystemExit(f"{name} {dtype}: two runs differ")
    return len(cases)


if __name__ == "__main__":
    print(f"{run('cuda')} calls, twice each", file=sys.stderr)
