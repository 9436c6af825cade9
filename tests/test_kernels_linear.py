"""The linear launcher: what it reads and writes, tails, tiles, every epilogue."""

import pytest
import torch
import torch.nn.functional as F
from arena import double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import linear

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 1, 1), (65, 67, 130), (129, 128, 72)])
def test_linear(dtype, activation, rows, depth, width):
    x, weight = random(rows, depth, dtype=dtype), random(width, depth, dtype=dtype, scale=depth**-0.5)
    bias, scale, residual = (random(*shape, dtype=dtype) for shape in ((width,), (width,), (rows, width)))
    y, preact = run(linear, x, weight, bias, scale, residual, activation, True, None)

    def mathematics(x, weight, bias, scale, residual):
        preact = F.linear(x, weight, bias)
        return preact, residual + scale * ACTIVATIONS[activation](preact)

    exact = mathematics(*double(x, weight, bias, scale, residual))
    eager = mathematics(x, weight, bias, scale, residual)
    assert_close("preact", preact, exact[0], eager[0])
    assert_close("y", y, exact[1], eager[1])
    bare, empty = run(linear, x, weight, None, None, None, activation, False, None)
    assert empty.numel() == 0
    exact, eager = (ACTIVATIONS[activation](F.linear(*t)) for t in (double(x, weight), (x, weight)))
    assert_close("bare", bare, exact, eager)
