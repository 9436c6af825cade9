"""The CUDA C++ attention: forward and every gradient against fp64 mathematics, on the emulator and on a GPU."""

import pytest
import torch
from harness import check
from test_attention import eager, fused, sample

LOW = (torch.float16, torch.bfloat16)
# batch, heads, tokens, head dim
SHAPES = [(1, 1, 1, 32), (2, 3, 17, 40), (1, 2, 50, 64), (1, 1, 65, 72), (1, 1, 197, 64), (2, 1, 16, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_parity(cuda_place, dtype, shape):
    check(cuda_place, dtype, fused, eager, sample(*shape), gradients=False)
