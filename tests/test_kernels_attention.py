"""The attention launcher: what it reads and writes, tails, tiles, masks."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, arena, double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import _tuning, attention


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
