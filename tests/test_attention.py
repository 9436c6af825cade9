"""attention and attention_packed: every backend against fp64 mathematics, forward and all gradients."""

import math

import pytest
import torch
from harness import check, check_upstreams, dtypes_of, places

import fastvit
from fastvit import ops

PLACES = places("attention")
# batch, heads, tokens, head dim
SHAPES = [(1, 1, 1, 16), (2, 3, 17, 32), (1, 2, 50, 64), (1, 1, 65, 59), (1, 1, 197, 64), (2, 1, 16, 80)]


def eager(q, k, v, mask=None, causal=False, scale=None):
    """The definition, as eager code writes it."""
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0) @ v


def fused(q, k, v, mask=None, causal=False, scale=None):
    return ops.attention(q, k, v, mask=mask, causal=causal, scale=scale)


def sample(batch, heads, tokens, head_dim, keys=None):
    def randn(n):
        return torch.randn(batch, heads, n, head_dim, dtype=torch.float64)

    return {"q": randn(tokens), "k": randn(keys or tokens), "v": randn(keys or tokens)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_parity(place, shape):
    for dtype in dtypes_of(place):
        check(place, dtype, fused, eager, sample(*shape))


@pytest.mark.parametrize("keys", [1, 7, 40])
@pytest.mark.parametrize("place", PLACES)
def test_other_number_of_keys(place, keys):
    # with a single key the exact gradient of q and k is 0, so there is no eager error to measure ours by
    check(place, torch.float32, fused, eager, sample(2, 2, 19, 32, keys=keys), gradients=keys > 1)


@pytest.mark.parametrize("place", PLACES)
def test_scale_and_causal(place):
    for options in ({"scale": 0.3}, {"causal": True}, {"causal": True, "scale": 0.7}):
        check(
            place,
            torch.float32,
            lambda q, k, v, _o=options: fused(q, k, v, **_o),
            lambda q, k, v, _o=options: eager(q, k, v, **_o),
            sample(1, 2, 37, 32),
        )


def masks(batch, heads, tokens):
    keep = torch.rand(batch, 1, 1, tokens) > 0.3
    keep[..., 0] = True
    full = torch.rand(batch, heads, tokens, tokens) > 0.5
    full[:, :, 3] = False
    bias = torch.randn(heads, tokens, tokens)
    holes = torch.zeros(tokens, tokens).masked_fill(torch.rand(tokens, tokens) > 0.7, -math.inf)
    holes[2] = -math.inf
    return {"padding": keep, "full": full, "bias": bias, "additive with holes": holes}


@pytest.mark.parametrize("kind", ["padding", "full", "bias", "additive with holes"])
@pytest.mark.parametrize("place", PLACES)
def test_masks(place, kind):
    mask = masks(2, 2, 21)[kind]
    for dtype in dtypes_of(place):
        check(place, dtype, fused, eager, sample(2, 2, 21, 32), {"mask": mask})
    check(
        place,
        torch.float32,
        lambda q, k, v, mask: fused(q, k, v, mask, causal=True),
        lambda q, k, v, mask: eager(q, k, v, mask, causal=True),
        sample(2, 2, 21, 32),
        {"mask": mask},
    )


@pytest.mark.parametrize("place", PLACES)
def test_fully_masked_rows_and_hidden_nan(place):
    """A query that sees no key gives exactly 0, and so does its gradient; what a hidden key holds never shows."""
    q, k, v = (t.float().to(place.device) for t in sample(1, 2, 9, 32).values())
    mask = torch.ones(9, 9, dtype=torch.bool, device=place.device)
    mask[4], mask[:, 7] = False, False
    k, v = k.clone(), v.clone()
    k[:, :, 7], v[:, :, 7] = torch.nan, torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with fastvit.backend(place.backend):
        out = ops.attention(*leaves, mask=mask)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert torch.isfinite(out).all()
    assert torch.equal(out[:, :, 4], torch.zeros_like(out[:, :, 4]))
    assert torch.equal(grads[0][:, :, 4], torch.zeros_like(out[:, :, 4]))
    for grad in grads:
        assert torch.isfinite(grad).all()
    assert torch.equal(grads[2][:, :, 7], torch.zeros_like(grads[2][:, :, 7]))


@pytest.mark.parametrize("place", PLACES)
def test_padding_never_leaks(place):
    """With V = 1 every row is 1 whatever the scores; near -20 a leaked padding key would take all the weight."""
    tokens = [*range(1, 20), 31, 33, 63, 64, 65, 127, 129, 130, 197]
    for n in tokens if place.backend != "triton" else tokens[::3]:
        q = torch.full((1, 1, n, 32), -20.0 / 32, device=place.device)
        k = torch.ones(1, 1, n, 32, device=place.device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            with fastvit.backend(place.backend):
                out = ops.attention(q.to(dtype), k.to(dtype), torch.ones_like(k, dtype=dtype), scale=1.0)
            assert torch.allclose(out.float(), torch.ones_like(k), atol=2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("place", PLACES)
def test_shift_invariance(place):
    q, k, v = (t.float().to(place.device) for t in sample(1, 1, 33, 32).values())
    with fastvit.backend(place.backend):
        want = ops.attention(q, k, v)
        shifted = ops.attention(q, k, v, mask=torch.full((33, 33), 30.0, device=place.device))
    assert torch.allclose(shifted, want, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_large_scores_do_not_overflow(place):
    q, k, v = (t.to(place.device, torch.float16) for t in sample(1, 1, 70, 64).values())
    with fastvit.backend(place.backend):
        out = ops.attention(q * 50, k * 50, v, scale=1.0)
    assert torch.isfinite(out).all()


TRITON = [place for place in PLACES if place.values[0].backend == "triton"]


@pytest.mark.parametrize("place", PLACES)
def test_incoming_gradients(place):
    tensors = {"qkv": torch.randn(2, 13, 3 * 2 * 32)}
    exact = place.backend == "triton"
    check_upstreams(place, torch.float32, lambda qkv: ops.attention_packed(qkv, 2), tensors, exact=exact)
    if exact:
        low = {"qkv": torch.randn(2, 13, 3 * 2 * 16)}
        check_upstreams(place, torch.bfloat16, lambda qkv: ops.attention_packed(qkv, 2), low)


@pytest.mark.parametrize("place", TRITON)
@pytest.mark.parametrize("tokens", [20, 140])
def test_batch_order_and_repetition_do_not_change_a_bit(place, tokens):
    qkv = torch.randn(4, tokens, 3 * 32, dtype=torch.float16, device=place.device)
    weight = torch.randn(16, dtype=torch.float16, device=place.device).requires_grad_()

    def call(qkv, dout):
        qkv = qkv.detach().requires_grad_()
        with fastvit.backend(place.backend):
            out = ops.attention_packed(qkv, 2, q_norm=(weight, None, 1e-6))
        return out, *torch.autograd.grad(out, (qkv, weight), dout)

    dout = torch.randn(4, tokens, 32, dtype=torch.float16, device=place.device)
    first = call(qkv, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, call(qkv, dout), strict=True))
    order = torch.tensor([2, 0, 3, 1], device=place.device)
    turned = call(qkv[order], dout[order])
    assert all(torch.equal(a[order], b) for a, b in zip(first[:2], turned[:2], strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_views_equal_contiguous(place):
    base = torch.randn(2, 13, 3, 2, 32, device=place.device)
    q, k, v = (t.transpose(1, 2) for t in base.unbind(2))
    with fastvit.backend(place.backend):
        want = ops.attention(q.contiguous(), k.contiguous(), v.contiguous())
        assert torch.allclose(ops.attention(q, k, v), want, atol=1e-6)
        flat = torch.full((base.numel() + 3,), torch.nan, device=place.device)
        flat[3:] = base.reshape(-1)
        shifted = [t.transpose(1, 2) for t in flat[3:].view(base.shape).unbind(2)]
        assert torch.allclose(ops.attention(*shifted), want, atol=1e-6)
        transposed = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
        assert torch.allclose(ops.attention(*transposed), want, atol=1e-6)
        one = ops.attention(q[:1].expand(3, -1, -1, -1), k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1))
        assert torch.allclose(one, want[:1].expand(3, -1, -1, -1), atol=1e-6)
        flipped = ops.attention(q.flip(0), k.flip(0), v.flip(0))
        assert torch.equal(flipped.flip(0), ops.attention(q, k, v))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(0, 2, 5, 32), (2, 2, 0, 32)], ids=str)
def test_empty(place, shape):
    q = torch.randn(shape, device=place.device, requires_grad=True)
    with fastvit.backend(place.backend):
        out = ops.attention(q, q, q)
        out.sum().backward()
        qkv = torch.randn(shape[0], shape[2], 3 * 64, device=place.device, requires_grad=True)
        weight = torch.ones(32, device=place.device, requires_grad=True)
        packed = ops.attention_packed(qkv, 2, q_norm=(weight, None, 1e-6))
        packed.sum().backward()
        cu = torch.zeros(1 if shape[0] == 0 else 3, dtype=torch.int32, device=place.device)
        varlen = ops.attention_varlen(qkv.flatten(0, 1), cu, 0, 2)
        varlen.sum().backward()
    assert out.shape == shape
    assert q.grad.shape == shape
    assert packed.shape == (shape[0], shape[2], 64)
    assert varlen.shape == (0, 64)
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("place", PLACES)
def test_every_output_is_written(place, nan_filled):
    with fastvit.backend(place.backend):
        qkv = torch.randn(2, 23, 3 * 48).to(place.device).requires_grad_()
        weight = torch.randn(16, device=place.device, requires_grad=True)
        cu = torch.tensor([0, 20, 20, 46], dtype=torch.int32, device=place.device)
        calls = (
            lambda: ops.attention_packed(qkv, 3),
            lambda: ops.attention_packed(
                qkv, 3, q_norm=(weight, weight, 1e-6), k_norm=(weight, None, 1e-6), dropout=0.2
            ),
            lambda: ops.attention_varlen(qkv.flatten(0, 1), cu, 26, 3, k_norm=(weight, weight, 1e-6)),
        )
        for call in calls:
            out = call()
            grads = torch.autograd.grad(out.sum(), (qkv, weight), allow_unused=True)
            assert not any(t is not None and t.isnan().any() for t in (out, *grads))


def test_mask_gradient():
    mask = torch.randn(1, 2, 9, 9, requires_grad=True)
    q, k, v = (t.float() for t in sample(1, 2, 9, 16).values())
    (got,) = torch.autograd.grad(ops.attention(q, k, v, mask=mask).sin().sum(), mask)
    (want,) = torch.autograd.grad(eager(q, k, v, mask).sin().sum(), mask)
    assert torch.allclose(got, want, atol=1e-6)


def test_gradcheck():
    leaves = [t.requires_grad_() for t in sample(1, 2, 5, 4).values()]
    for backend in ("reference", "cpu"):
        if fastvit.is_available(backend):
            with fastvit.backend(backend):
                assert torch.autograd.gradcheck(fused, tuple(leaves), nondet_tol=0)


Q = torch.randn(1, 2, 5, 16)
QKV = torch.randn(1, 5, 96)
CU = torch.tensor([0, 5], dtype=torch.int32)


def varlen(cu_seqlens, max_seqlen=5, **options):
    return ops.attention_varlen(QKV[0], cu_seqlens, max_seqlen, 2, **options)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "q must be 4-D, got shape", lambda: ops.attention(Q[0], Q, Q)),
        (TypeError, "k must have q's dtype", lambda: ops.attention(Q, Q.half(), Q)),
        (ValueError, r"v must have shape \(1, 2, 5, 16\)", lambda: ops.attention(Q, Q, Q[:, :, :4])),
        (ValueError, r"k must have shape", lambda: ops.attention(Q, Q[..., :8], Q)),
        (ValueError, r"mask must broadcast to \(1, 2, 5, 5\)", lambda: ops.attention(Q, Q, Q, mask=torch.ones(5, 4))),
        (TypeError, "mask must be a bool", lambda: ops.attention(Q, Q, Q, mask=torch.ones(5, 5).int())),
        (ValueError, "scale must be a finite number", lambda: ops.attention(Q, Q, Q, scale=math.nan)),
        (ValueError, "dropout must be in", lambda: ops.attention(Q, Q, Q, dropout=1.5)),
        (ValueError, "num_heads must be a positive integer", lambda: ops.attention_packed(QKV, 0)),
        (ValueError, r"qkv must be \(B, N, 3·num_heads·E\)", lambda: ops.attention_packed(QKV, 5)),
        (ValueError, "qkv must be 3-D", lambda: ops.attention_packed(QKV[0], 2)),
        (TypeError, "cu_seqlens must be an int32 Tensor, got torch.int64", lambda: varlen(CU.long())),
        (TypeError, "cu_seqlens must be an int32 Tensor, got list", lambda: varlen([0, 5])),
        (ValueError, r"cu_seqlens must be \(sequences \+ 1,\), got shape \(1, 2\)", lambda: varlen(CU[None])),
        (ValueError, r"cu_seqlens must be \(sequences \+ 1,\), got shape \(1,\)", lambda: varlen(CU[:1])),
        (ValueError, "cu_seqlens must be on qkv's device cpu, got meta", lambda: varlen(CU.to("meta"))),
        (ValueError, "max_seqlen must be a positive integer, got 0", lambda: varlen(CU, 0)),
        (ValueError, "max_seqlen must be a positive integer, got 2.5", lambda: varlen(CU, 2.5)),
        (ValueError, "attention_varlen: qkv must be 2-D", lambda: ops.attention_varlen(QKV, CU, 5, 2)),
        (ValueError, "attention_varlen: num_heads must be", lambda: ops.attention_varlen(QKV[0], CU, 5, 0)),
        (ValueError, "attention_varlen: dropout must be in", lambda: varlen(CU, dropout=-1)),
        (ValueError, "attention_varlen: eps must be a number", lambda: varlen(CU, k_norm=(None, None, -1.0))),
        (
            ValueError,
            r"q_norm's weight must have shape \(16,\), got \(15,\)",
            lambda: varlen(CU, q_norm=(Q[0, 0, 0, :15], None, 0.1)),
        ),
        (
            TypeError,
            "q_norm's bias must have the input's dtype",
            lambda: varlen(CU, q_norm=(None, Q[0, 0, 0].half(), 0.1)),
        ),
        (ValueError, "head dimension of q must not be empty", lambda: ops.attention(*[Q[..., :0]] * 3)),
    ],
)
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
