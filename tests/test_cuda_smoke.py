"""The calls that compute-sanitizer watches, and many runs of the same call: bits must not change."""

import cuda_smoke
import pytest
import torch

import fastvit
from fastvit import ops


def test_two_runs_agree(cuda_place):
    assert cuda_smoke.run(cuda_place.device) > 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU: this machine has none")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_250_runs_agree(backend):
    """Forward and backward of attention and LayerNorm at batch 60, beside whatever else the device does."""
    qkv = torch.randn(60, 197, 3 * 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(768, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    dy = torch.randn(60, 197, 768, device="cuda", dtype=torch.bfloat16)

    def run():
        y = ops.layer_norm(ops.attention_packed(qkv, 12), weight, bias)
        return [y, *torch.autograd.grad(y, (qkv, weight, bias), dy)]

    with fastvit.backend(backend):
        first = run()
        for _ in range(249):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
