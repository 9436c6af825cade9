"""The norm_mlp launcher: what it reads, writes and keeps."""

import pytest
import torch
import torch.nn.functional as F
from arena import double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import norm_mlp


@each_dtype
def test_norm_mlp(dtype):
    rows, width, hidden = 67, 72, 131
    x, norm_weight, norm_bias = random(rows, width, dtype=dtype), random(width, dtype=dtype), random(width, dtype=dtype)
    up, up_bias = random(hidden, width, dtype=dtype, scale=width**-0.5), random(hidden, dtype=dtype)
    down, down_bias = random(width, hidden, dtype=dtype, scale=hidden**-0.5), random(width, dtype=dtype)
    tensors = (x, norm_weight, norm_bias, up, up_bias, down, down_bias, random(width, dtype=dtype))

    def mathematics(x, norm_weight, norm_bias, up, up_bias, down, down_bias, scale):
        preact = F.linear(F.layer_norm(x, (width,), norm_weight, norm_bias, 1e-6), up, up_bias)
        return preact, x + scale * F.linear(F.gelu(preact), down, down_bias)

    exact, eager = mathematics(*double(*tensors)), mathematics(*tensors)
    y, mean, rstd, preact = run(norm_mlp, *tensors, 1e-6, "gelu", True, True, None)
    assert_close("preact", preact, exact[0], eager[0])
    assert_close("y", y, exact[1], eager[1])
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (x.double().var(1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
    again, *nothing = run(norm_mlp, *tensors, 1e-6, "gelu", True, False, None)
    assert torch.equal(again, y)
    assert not any(t.numel() for t in nothing)
