"""The Triton launchers themselves: what they read and write, tails, tiles and strides. Parity at large is per op."""

import contextlib
import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastvit.kernels import _device, _tuning, attention, layer_norm, linear, norm_mlp, patch_embed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAUNCHERS = [attention, layer_norm, linear, norm_mlp, patch_embed]
BAND = 64

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def arena(tensor):
    """The same values inside a larger buffer of NaN: padded rows, and a start off every 16-byte boundary."""
    *outer, width = tensor.shape
    rows = math.prod(outer)
    filler = math.nan if tensor.is_floating_point() else 1
    buffer = torch.full((BAND + rows * (width + 5) + BAND,), filler, dtype=tensor.dtype, device=DEVICE)
    view = buffer[BAND + 3 :][: rows * (width + 5)].view(*outer, width + 5)[..., :width]
    return view.copy_(tensor)


def random(*shape, dtype, scale=1.0):
    return arena((torch.randn(shape) * scale).to(dtype))


def double(*tensors):
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


@contextlib.contextmanager
def guarded_outputs():
    """Outputs are allocated full of NaN between bands of NaN, which must still be there afterwards."""
    buffers = []
    empty, empty_like = torch.empty, torch.empty_like

    def guarded(size, **options):
        size = (size,) if isinstance(size, int) else size
        count = math.prod(size)
        buffers.append((torch.full((count + 2 * BAND,), math.nan, **options), count))
        return buffers[-1][0][BAND : BAND + count].view(size)

    torch.empty = guarded
    torch.empty_like = lambda x: guarded(tuple(x.shape), dtype=x.dtype, device=x.device)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    assert buffers
    for buffer, count in buffers:
        assert buffer[:BAND].isnan().all(), "written before the start of an output"
        assert buffer[BAND + count :].isnan().all(), "written beyond the end of an output"


def run(launcher, *arguments):
    assert launcher.why_not(*arguments) is None
    with guarded_outputs():
        return launcher.forward(*arguments)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_why_not_takes_what_forward_takes(launcher):
    assert list(inspect.signature(launcher.why_not).parameters) == list(inspect.signature(launcher.forward).parameters)


def test_why_not_says_what_is_wrong():
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    assert "got float64" in layer_norm.why_not(x, None, None, None, None, 1e-6)
    q = torch.zeros(1, 1, 2, 257, device=DEVICE)
    assert "up to 256, got 257" in attention.why_not(q, q, q, None, False, 1.0)
    assert "got meta" in linear.why_not(torch.zeros(2, 4, device="meta"), None, None, None, None, "none", False)


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


@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(5, 1), (130, 3), (3, 768), (2, 1023), (2, 1664), (2, 9001)])
def test_layer_norm(dtype, rows, width):
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    scale, weight, bias = (random(width, dtype=dtype) for _ in range(3))
    y, z, mean, rstd = run(layer_norm, x, residual, scale, weight, bias, 1e-6)
    assert_close("z", z, *(r + s * t for r, s, t in (double(residual, scale, x), (residual, scale, x))))
    exact, eager = (F.layer_norm(*t[:1], (width,), *t[1:], 1e-6) for t in (double(z, weight, bias), (z, weight, bias)))
    assert_close("y", y, exact, eager)
    centred = z.double() - z.double().mean(1, keepdim=True)
    torch.testing.assert_close(mean.double(), z.double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (centred.square().mean(1) + 1e-6).rsqrt(), rtol=1e-4, atol=0)
    bare, empty, _, _ = run(layer_norm, x, None, None, None, None, 1e-6)
    assert empty.numel() == 0
    assert_close("bare", bare, *(F.layer_norm(t, (width,), eps=1e-6) for t in (x.double(), x)))


def test_layer_norm_of_very_many_and_of_very_wide_rows():
    # On a GPU more programs than the second and third grid axis hold.
    x = torch.randn(5_000_003 if DEVICE == "cuda" else 5_003, 16, device=DEVICE)
    y = run(layer_norm, x, None, None, None, None, 1e-6)[0]
    assert_close("rows", y, *(F.layer_norm(t, (16,), eps=1e-6) for t in (x.double(), x)))
    x = 1e4 + torch.randn(2, 65_537, device=DEVICE)
    y = run(layer_norm, x, None, None, None, None, 1e-6)[0]
    assert_close("width", y, *(F.layer_norm(t, (65_537,), eps=1e-6) for t in (x.double(), x)))


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 1, 1), (65, 67, 130), (129, 128, 72)])
def test_linear(dtype, activation, rows, depth, width):
    x, weight = random(rows, depth, dtype=dtype), random(width, depth, dtype=dtype, scale=depth**-0.5)
    bias, scale, residual = (random(*shape, dtype=dtype) for shape in ((width,), (width,), (rows, width)))
    y, preact = run(linear, x, weight, bias, scale, residual, activation, True)

    def mathematics(x, weight, bias, scale, residual):
        preact = F.linear(x, weight, bias)
        return preact, residual + scale * ACTIVATIONS[activation](preact)

    exact = mathematics(*double(x, weight, bias, scale, residual))
    eager = mathematics(x, weight, bias, scale, residual)
    assert_close("preact", preact, exact[0], eager[0])
    assert_close("y", y, exact[1], eager[1])
    bare, empty = run(linear, x, weight, None, None, None, activation, False)
    assert empty.numel() == 0
    exact, eager = (ACTIVATIONS[activation](F.linear(*t)) for t in (double(x, weight), (x, weight)))
    assert_close("bare", bare, exact, eager)


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
    y, mean, rstd, preact = run(norm_mlp, *tensors, 1e-6, "gelu", True, True)
    assert_close("preact", preact, exact[0], eager[0])
    assert_close("y", y, exact[1], eager[1])
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (x.double().var(1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
    again, *nothing = run(norm_mlp, *tensors, 1e-6, "gelu", True, False)
    assert torch.equal(again, y)
    assert not any(t.numel() for t in nothing)


def attend(q, k, v, mask=None, causal=False):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def packed(batch, tokens, heads, head_dim, dtype):
    return (
        random(batch, tokens, 3 * heads * head_dim, dtype=dtype)
        .unflatten(2, (3, heads, head_dim))
        .permute(2, 0, 3, 1, 4)
    )


@each_dtype
@pytest.mark.parametrize(
    ("tokens", "head_dim"), [(1, 16), (17, 59), (64, 64), (197, 64), (130, 80), (300, 32), (20, 256)]
)
def test_attention(dtype, tokens, head_dim):
    q, k, v = packed(2, tokens, 2, head_dim, dtype)
    scale = head_dim**-0.5
    out, lse = run(attention, q, k, v, None, False, scale)
    assert_close("out", out, attend(*double(q, k, v)), attend(q, k, v))
    exact = torch.logsumexp(q.double() @ k.double().mT * scale, dim=-1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)
    out, _ = run(attention, q, k, v, None, True, scale)
    assert_close("causal", out, attend(*double(q, k, v), causal=True), attend(q, k, v, causal=True))
    mask = random(2, 1, 1, tokens, dtype=dtype).expand(2, 2, tokens, tokens)
    q = random(2, 2, tokens, head_dim, dtype=dtype)  # its own rows end in NaN, those of a packed q in k
    out, _ = run(attention, q, k, v, mask, False, scale)
    assert_close("additive", out, attend(*double(q, k, v, mask)), attend(q, k, v, mask))


@each_dtype
def test_attention_in_tiles_is_attention_in_one_pass(dtype, monkeypatch):
    q, k, v = packed(1, 100, 2, 64, dtype)
    mask = torch.rand(1, 2, 100, 100, device=DEVICE) > 0.5
    choose = _tuning.scores
    monkeypatch.setattr(
        _tuning, "scores", lambda *args: dataclasses.replace(choose(*args), BLOCK_M=32, BLOCK_N=16, ONE_PASS=False)
    )
    out, lse = run(attention, q, k, v, mask, False, 0.125)
    assert_close("out", out, attend(*double(q, k, v), mask), attend(q, k, v, mask))
    scores = (q.double() @ k.double().mT * 0.125).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, dim=-1), rtol=1e-5, atol=1e-5)


@each_dtype
def test_padding_keys_never_leak_into_the_softmax(dtype):
    for tokens in (*range(1, 18), 31, 32, 33, 63, 65, 127, 128, 130, 197, 257):
        q = arena(torch.ones(1, 1, tokens, 16, dtype=dtype))
        k = arena(torch.full((1, 1, tokens, 16), -1.25, dtype=dtype))
        v = arena(torch.ones(1, 1, tokens, 16, dtype=dtype))
        out, lse = run(attention, q, k, v, None, False, 1.0)
        torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=4e-3 if dtype != torch.float32 else 1e-5)
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(tokens) - 20), rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("tokens", [20, 150])
def test_what_a_boolean_mask_hides_stays_invisible(dtype, tokens):
    q, k, v = packed(1, tokens, 2, 32, dtype)
    mask = torch.rand(1, 2, tokens, tokens, device=DEVICE) > 0.5
    mask[..., 3] = False
    mask[:, :, 0] = False
    exact = attend(*double(q, k, v), mask).nan_to_num(0)
    eager = attend(q, k, v, mask).nan_to_num(0)
    k[:, :, 3] = math.nan
    v[:, :, 3] = math.nan
    out, lse = run(attention, q, k, v, mask, False, 32**-0.5)
    assert_close("out", out, exact, eager)
    assert bool((out[:, 0] == 0).all())
    assert bool((lse[:, :, 0] == -math.inf).all())
    v[0, 1, tokens - 1, 5] = math.nan
    v[0, 1, tokens - 2, 7] = -math.inf
    out, _ = run(attention, q, k, v, mask, False, 32**-0.5)
    assert torch.equal(out[0, :, 1, 5].isnan(), mask[0, 1, :, tokens - 1])
    assert torch.equal(out[0, :, 1, 7] == -math.inf, mask[0, 1, :, tokens - 2])
    assert int(out.isfinite().logical_not().sum()) == int(mask[0, 1, :, tokens - 2 :].sum())


def test_rows_that_an_additive_mask_closes_are_zero():
    q, k, v = packed(1, 40, 1, 16, torch.float32)
    mask = torch.zeros(1, 1, 40, 40, device=DEVICE)
    mask[..., 7, :] = -math.inf
    out, lse = run(attention, q, k, v, mask, False, 0.25)
    assert bool((out[:, 7] == 0).all())
    assert int((lse == -math.inf).sum()) == 1
    assert bool(out.isfinite().all())


@each_dtype
@pytest.mark.parametrize("patch", [(16, 16), (3, 5)])
@pytest.mark.parametrize("prefixed_positions", [True, False])
def test_patch_embed(dtype, patch, prefixed_positions):
    height, width = 2 * patch[0], 3 * patch[1]
    weight = arena(torch.randn(40, 3, *patch).to(dtype) / 20).contiguous()
    bias, prefix = random(40, dtype=dtype), random(2, 40, dtype=dtype)
    table = random(8 if prefixed_positions else 6, 40, dtype=dtype)
    scale, shift = torch.rand(3, device=DEVICE) / 50, torch.randn(3, device=DEVICE)

    def mathematics(image, weight, bias, prefix, table):
        patches = F.conv2d(image, weight, bias, stride=patch).flatten(2).mT
        if not prefixed_positions:
            patches = patches + table
        tokens = torch.cat([prefix.expand(2, -1, -1), patches], dim=1)
        return tokens + table if prefixed_positions else tokens

    floats = random(2, 3, height + 2, width + 3, dtype=dtype)[..., 1:-1, 2:-1]
    channels_last = torch.randn(2, 3, height, width).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    for image in (floats, channels_last):
        tokens = run(patch_embed, image, weight, bias, table, prefix, None, None)
        tensors = (image, weight, bias, prefix, table)
        assert_close("tokens", tokens, mathematics(*double(*tensors)), mathematics(*tensors))
    pixels = arena(torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)).permute(0, 3, 1, 2)
    tokens = run(patch_embed, pixels, weight, bias, table, prefix, scale, shift)
    image = (pixels * scale[:, None, None] + shift[:, None, None]).to(dtype)
    tensors = (image, weight, bias, prefix, table)
    assert_close("uint8", tokens, mathematics(*double(*tensors)), mathematics(*tensors))
    bare = patch_embed.forward(floats, weight, None, None, None, None, None)
    exact, eager = (F.conv2d(*t, stride=patch).flatten(2).mT for t in (double(floats, weight), (floats, weight)))
    assert_close("bare", bare, exact, eager)


def test_strides_beyond_32_bits():
    far = 1 << 31
    # Two pages of it are touched, so the rest costs address space and no memory.
    buffer = torch.empty(far + 64, dtype=torch.float16, device=DEVICE)
    rows = buffer.as_strided((2, 16), (far, 1)).copy_(torch.randn(2, 16))
    near = rows.contiguous()
    weight = torch.randn(8, 16, device=DEVICE).half()
    heads = rows.view(1, 1, 2, 16)
    assert torch.equal(
        layer_norm.forward(rows, rows, None, None, None, 1e-6)[0],
        layer_norm.forward(near, near, None, None, None, 1e-6)[0],
    )
    assert torch.equal(
        linear.forward(rows, weight, None, None, None, "none", False)[0],
        linear.forward(near, weight, None, None, None, "none", False)[0],
    )
    assert torch.equal(
        attention.forward(heads, heads, heads, None, False, 0.25)[0],
        attention.forward(*[near.view(1, 1, 2, 16)] * 3, None, False, 0.25)[0],
    )


@each_dtype
def test_nothing_in_nothing_out(dtype):
    def empty(*shape):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    y, z, mean, rstd = layer_norm.forward(empty(0, 8), empty(0, 8), None, None, None, 1e-6)
    assert [tuple(t.shape) for t in (y, z, mean, rstd)] == [(0, 8), (0, 8), (0,), (0,)]
    y, preact = linear.forward(empty(0, 8), empty(4, 8), None, None, None, "gelu", True)
    assert (tuple(y.shape), tuple(preact.shape), y.dtype) == ((0, 4), (0, 4), dtype)
    outputs = norm_mlp.forward(
        empty(0, 8), None, None, empty(16, 8), None, empty(8, 16), None, None, 1e-6, "gelu", True, True
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
