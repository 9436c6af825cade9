"""The Triton launchers together: signatures, refusals, far strides, nothing in and nothing out."""

import inspect
import math

import pytest
import torch
from arena import DEVICE, each_dtype

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastvit.kernels import _device, attention, group_norm, layer_norm, linear, norm_mlp, patch_embed

LAUNCHERS = [attention, group_norm, layer_norm, linear, norm_mlp, patch_embed]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_why_not_takes_what_forward_takes(launcher):
    assert list(inspect.signature(launcher.why_not).parameters) == list(inspect.signature(launcher.forward).parameters)


def test_why_not_says_what_is_wrong():
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    assert "got float64" in layer_norm.why_not(x, None, None, None, None, 1e-6, None)
    q = torch.zeros(1, 1, 2, 257, device=DEVICE)
    assert "up to 256, got 257" in attention.why_not(q, q, q, None, False, 1.0)
    assert "got meta" in linear.why_not(torch.zeros(2, 4, device="meta"), None, None, None, None, "none", False, None)


@pytest.mark.skipif(not _device.INTERPRETING, reason="GPU: nothing is interpreted here")
def test_interpreted_bf16_rounds_as_torch():
    @triton.jit
    def _round_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))

    special = [1.999, -1.999, 255.9, math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8]
    x = torch.cat([torch.tensor(special), torch.randn(4096 - len(special))])
    y = torch.empty(4096, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, y, COUNT=4096)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_strides_beyond_32_bits():
    far = 1 << 31
    # Two pages of it are touched, so the rest costs address space and no memory.
    buffer = torch.empty(far + 64, dtype=torch.float16, device=DEVICE)
    rows = buffer.as_strided((2, 16), (far, 1)).copy_(torch.randn(2, 16))
    near = rows.contiguous()
    weight = torch.randn(8, 16, device=DEVICE).half()
    heads = rows.view(1, 1, 2, 16)
    assert torch.equal(
        layer_norm.forward(rows, rows, None, None, None, 1e-6, None)[0],
        layer_norm.forward(near, near, None, None, None, 1e-6, None)[0],
    )
    assert torch.equal(
        linear.forward(rows, weight, None, None, None, "none", False, None)[0],
        linear.forward(near, weight, None, None, None, "none", False, None)[0],
    )
    assert torch.equal(
        attention.forward(heads, heads, heads, None, False, 0.25)[0],
        attention.forward(*[near.view(1, 1, 2, 16)] * 3, None, False, 0.25)[0],
    )


@each_dtype
def test_nothing_in_nothing_out(dtype):
    def empty(*shape):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    y, z, mean, rstd = layer_norm.forward(empty(0, 8), empty(0, 8), None, None, None, 1e-6, None)
    assert [tuple(t.shape) for t in (y, z, mean, rstd)] == [(0, 8), (0, 8), (0,), (0,)]
    y, preact = linear.forward(empty(0, 8), empty(4, 8), None, None, None, "gelu", True, None)
    assert (tuple(y.shape), tuple(preact.shape), y.dtype) == ((0, 4), (0, 4), dtype)
    outputs = norm_mlp.forward(
        empty(0, 8), None, None, empty(16, 8), None, empty(8, 16), None, None, 1e-6, "gelu", True, True, None
    )
    assert [tuple(t.shape) for t in outputs] == [(0, 8), (0,), (0,), (0, 16)]
    for batch, tokens in ((0, 5), (2, 0)):
        q = empty(batch, 3, tokens, 8)
        out, lse = attention.forward(q, q, q, None, False, 1.0)
        assert (tuple(out.shape), tuple(lse.shape)) == ((batch, tokens, 3, 8), (batch, 3, tokens))
    out, lse = attention.forward(empty(1, 2, 3, 8), empty(1, 2, 0, 8), empty(1, 2, 0, 8), None, False, 1.0)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())
    tokens = patch_embed.forward(empty(0, 3, 8, 8), empty(16, 3, 4, 4), None, None, empty(1, 16), None, None)
    assert tuple(tokens.shape) == (0, 5, 16)
