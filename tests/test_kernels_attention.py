"""The attention launchers: what they read and write, tails, tiles, masks."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, DTYPES, arena, double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import _tuning, _tuning_attention, attention


def attend(q, k, v, mask=None, causal=False):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def packed(batch, tokens, heads, head_dim, dtype):
    return (
        random(batch, tokens, 3 * heads * head_dim, dtype=dtype)
        .unflatten(2, (3, heads, head_dim))
        .permute(2, 0, 3, 1, 4)
    )


def gradients(function, tensors, dout):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dout)


def check(q, k, v, mask=None, causal=False):
    """Forward and backward against fp64, with out and its gradient in rows padded by NaN, gradients packed as qkv."""
    scale, rest = q.shape[-1] ** -0.5, (mask, causal, q.shape[-1] ** -0.5)
    out, lse = run(attention, q, k, v, *rest)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = functools.partial(attend, mask=wide, causal=causal)
    eager = functools.partial(attend, mask=mask, causal=causal)
    assert_close("out", out, exact(*double(q, k, v)), eager(q, k, v))
    if mask is None and not causal:
        scores = torch.logsumexp(q.double() @ k.double().mT * scale, dim=-1)
        torch.testing.assert_close(lse.double(), scores, rtol=1e-5, atol=1e-5)
    dout = arena(torch.randn(out.shape).to(q.dtype))
    grads = [arena(torch.full(t.shape, math.nan, dtype=t.dtype)) for t in (q, k, v)]
    assert run(attention, dout, q, k, v, arena(out), lse, *grads, *rest, entry="backward") == [None] * 4
    want, base = gradients(exact, double(q, k, v), dout.double()), gradients(eager, (q, k, v), dout)
    for name, grad, w, e in zip("qkv", grads, want, base, strict=True):
        assert_close(f"d{name}", grad, w, e, gradient=True)
        assert int(grad._base.isfinite().sum()) == grad.numel(), "written beyond the rows of a gradient"


TOKENS = (1, 2, 15, 16, 17, 50, 64, 65, 127, 129, 196, 197, 198, 256, 257, 577, 1025)
HEAD_DIMS = (16, 32, 48, 59, 64, 72, 80, 96, 128)
GRID = [(n, e, (1, 3)[i % 2]) for i, (n, e) in enumerate((n, e) for n in TOKENS[:-2] for e in HEAD_DIMS)]


@pytest.mark.grid(11)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("tokens", "head_dim", "batch"), GRID)
def test_grid(dtype, tokens, head_dim, batch):
    check(*packed(batch, tokens, 1, head_dim, dtype))


@pytest.mark.grid(1)
@pytest.mark.parametrize("tokens", TOKENS[-2:])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_grid_of_many_tokens(dtype, tokens, head_dim):
    check(*packed(1, tokens, 1, head_dim, dtype))


@each_dtype
@pytest.mark.parametrize(("tokens", "head_dim"), [(17, 59), (197, 64), (130, 80), (20, 256), (40, 200)])
def test_attention(dtype, tokens, head_dim):
    check(*packed(1, tokens, 2, head_dim, dtype))


@each_dtype
def test_masks(dtype):
    tokens = 70
    q, k, v = packed(2, tokens, 2, 32, dtype)
    check(q, k, v, causal=True)
    q = random(2, 2, tokens, 32, dtype=dtype)  # its own rows end in NaN, those of a packed q in k
    check(q, k, v, random(2, 1, 1, tokens, dtype=dtype).expand(2, 2, tokens, tokens))
    check(q, k, v, (torch.rand(2, 1, tokens, tokens, device=DEVICE) > 0.5).expand(2, 2, -1, -1))


@each_dtype
def test_many_heads_share_a_program(dtype, monkeypatch):
    assert 1 < _tuning.scores("sm_90", 2, 64, call(rows=50, heads=32)).HEADS == _tuning_attention.HEADS
    choose = _tuning.scores
    monkeypatch.setattr(_tuning, "scores", lambda *args: dataclasses.replace(choose(*args), HEADS=4))
    for tokens in (5, 50):
        check(*packed(2, tokens, 4, 16, dtype))


def call(rows, heads, keys=None):
    return attention._Call(rows, keys or rows, heads, cores=2, ragged=False, norm=False, costly=False)


def test_keys_are_cut_with_little_padding():
    for keys in range(1, 1100):
        cut = _tuning_attention.pieces(keys)
        assert len(cut) <= 3
        assert all(size >= 16 and size & (size - 1) == 0 for size in cut)
        assert keys <= sum(cut) <= max(16, 1.34 * keys + 16)
    assert [_tuning_attention.pieces(n) for n in (197, 50, 65, 257)] == [(128, 64, 16), (64,), (64, 16), (256, 16)]
    for width in range(1, 257):
        cut, small = _tuning_attention.widths(width, 2), _tuning_attention.widths(width, 4)
        assert len(cut) <= 2
        assert width <= sum(cut) <= max(16, 1.5 * width + 8)
        assert len(cut) == 1 or cut[0] < width
        assert width <= sum(small) < width + 16
        assert set(small[:-1]) <= {32}


@each_dtype
def test_attention_in_tiles_is_attention_in_one_pass(dtype, monkeypatch):
    q, k, v = packed(1, 100, 2, 64, dtype)
    mask = torch.rand(1, 2, 100, 100, device=DEVICE) > 0.5
    choose = _tuning.scores
    tiles = {"BLOCK_M": 32, "ROW_TILES": 1, "TILE": (16,), "PIECES": (16,), "FULL": 0, "ONE_PASS": False}
    monkeypatch.setattr(_tuning, "scores", lambda *args: dataclasses.replace(choose(*args), **tiles))
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
    grads = [torch.full_like(q, math.nan) for _ in range(3)]
    run(attention, torch.ones_like(out), q, k, v, out, lse, *grads, mask, False, 0.25, entry="backward")
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((grads[0][:, :, 7] == 0).all())


@each_dtype
@pytest.mark.parametrize("tokens", [20, 90])
def test_a_hidden_key_is_invisible_to_the_gradients_of_others(dtype, tokens):
    q, k, v = packed(1, tokens, 1, 32, dtype)
    mask = torch.rand(1, 1, tokens, tokens, device=DEVICE) > 0.5
    mask[..., 3], mask[..., 5, 3], mask[..., 0] = False, True, True
    rest = (mask, False, 0.2)
    plain = [torch.zeros_like(q) for _ in range(3)]
    clean = mask.clone()
    clean[..., 3] = False
    dout = random(1, tokens, 1, 32, dtype=dtype)
    attention.backward(dout, q, k, v, *attention.forward(q, k, v, clean, *rest[1:]), *plain, clean, *rest[1:])
    k[:, :, 3], v[:, :, 3] = math.nan, math.inf
    grads = [torch.zeros_like(q) for _ in range(3)]
    attention.backward(dout, q, k, v, *attention.forward(q, k, v, *rest), *grads, *rest)
    others = torch.arange(tokens, device=DEVICE) != 5
    assert torch.equal(grads[0][:, :, others], plain[0][:, :, others])
    assert bool(grads[0][:, :, 5].isnan().all())


@each_dtype
def test_backward_in_one_pass_is_backward_in_tiles(dtype, monkeypatch):
    q, k, v = packed(1, 60, 2, 32, dtype)
    one, tiles = _tuning.score_gradients, {"BLOCK_M": 16, "PIECES": (32,), "FULL": 0, "num_warps": 4}
    for one_pass in (True, False):
        choice = {**tiles, "PIECES": (64,) if one_pass else (32,), "ONE_PASS": one_pass}
        monkeypatch.setattr(_tuning, "score_gradients", lambda *a, _c=choice: dataclasses.replace(one(*a), **_c))
        check(q, k, v)
        check(q, k, v, causal=True)


@pytest.mark.parametrize("option", ["bool", "additive", "causal", "dropout", "norms"])
def test_options_do_not_depend_on_the_tiles(option, monkeypatch):
    """Several pieces of keys in one pass, and several tiles of them, whatever the tables choose for the option."""
    tokens = 40
    q, k, v = packed(1, tokens, 2, 32, torch.float32)
    masks = {"bool": torch.rand(1, 2, tokens, tokens) > 0.5, "additive": torch.randn(1, 2, tokens, tokens)}
    mask = masks[option].to(DEVICE) if option in masks else None
    norms = (*torch.randn(4, 32, device=DEVICE), 1e-6, 0.1) if option == "norms" else (None,) * 6
    seed = torch.tensor([123456789012], device=DEVICE)
    rest = (mask, option == "causal", 0.2, 0.3 if option == "dropout" else 0.0, seed, *norms)
    dout = random(1, tokens, 2, 32, dtype=torch.float32)

    def results():
        out, lse = attention.forward(q, k, v, *rest)
        grads = [torch.full_like(q, math.nan) for _ in range(3)]
        sums = attention.backward(dout, q, k, v, out, lse, *grads, *rest)
        return [out, lse, *grads, *(grad for grad in sums if grad is not None)]

    want = results()
    pieces = {"BLOCK_M": 16, "PIECES": (32, 16), "FULL": 1, "ONE_PASS": True}
    tiles = {"BLOCK_M": 16, "PIECES": (16,), "FULL": 0, "ONE_PASS": False}
    changes = {
        "scores": ({**pieces, "ROW_TILES": 3}, {**tiles, "TILE": (16,), "ROW_TILES": 1}),
        "score_gradients": (pieces, tiles),
        "score_gradients_of_queries": ({}, {"BLOCK_M": 16, "TILE": (16,), "PIECES": (16,), "FULL": 0}),
    }
    for i in range(2):
        for name, change in changes.items():
            choose = getattr(_tuning_attention, name)
            monkeypatch.setattr(
                _tuning, name, lambda *args, _c=change[i], _f=choose: dataclasses.replace(_f(*args), **_c)
            )
        for got, expected in zip(results(), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@each_dtype
def test_other_number_of_keys(dtype):
    for tokens, keys in ((5, 70), (70, 5), (19, 40)):
        q = random(2, 1, tokens, 32, dtype=dtype)
        check(q, *(random(2, 1, keys, 32, dtype=dtype) for _ in range(2)))


def test_lengths_that_lie_stay_inside_the_tensors():
    """The host never reads cu_seqlens: a wrong one may give wrong rows, but no access outside."""
    qkv = random(1, 40, 3 * 2 * 16, dtype=torch.float32).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    for lengths in ([0, 400], [25, 400], [-7, 20, 10, 41], [39, 0, 100]):
        cu_seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        rest = (None, False, 0.25, 0.0, *[None] * 7, cu_seqlens, 30)
        out, lse = run(attention, *qkv, *rest)
        grads = [arena(torch.zeros(t.shape)) for t in qkv]
        run(attention, torch.ones_like(out), *qkv, out.nan_to_num(), lse.nan_to_num(), *grads, *rest, entry="backward")


def test_rows_far_apart():
    """More than 2^31 elements lie between rows of a tile, or between the first row of a head and that of a tile."""
    for tokens, stride in ((40, 1 << 26), (260, (1 << 23) - 16)):
        # A page or two of each row are touched, the rest is address space and no memory.
        def packed_far(_rows=tokens, _stride=stride):
            buffer = torch.empty(_rows * _stride, dtype=torch.float16, device=DEVICE)
            return buffer.as_strided((3, 1, 1, _rows, 16), (16, 0, 0, _stride, 1))

        far = packed_far().copy_(torch.randn(3, 1, 1, tokens, 16))
        dout = torch.randn(1, tokens, 1, 16, device=DEVICE).half()
        results = []
        for qkv, grads in ((far.contiguous(), far.new_empty(far.shape)), (far, packed_far())):
            out, lse = attention.forward(*qkv, None, False, 0.25)
            attention.backward(dout, *qkv, out, lse, *grads, None, False, 0.25)
            results.append((out, lse, grads.contiguous()))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=["bool", "additive"])
def test_rows_of_a_mask_far_apart(dtype):
    q, k, v = packed(1, 40, 1, 16, torch.float16)
    far = torch.empty(40 << 26, dtype=dtype, device=DEVICE).as_strided((1, 1, 40, 40), (0, 0, 1 << 26, 1))
    far.copy_(torch.randn(40, 40) > 0 if dtype == torch.bool else torch.randn(40, 40))
    near = attention.forward(q, k, v, far.contiguous(), False, 0.25)
    assert all(torch.equal(*pair) for pair in zip(attention.forward(q, k, v, far, False, 0.25), near, strict=True))
