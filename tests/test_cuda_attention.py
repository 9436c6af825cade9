"""The CUDA C++ attention: forward and every gradient against fp64 mathematics, on the emulator and on a GPU."""

import math

import emulated
import pytest
import torch
from harness import FOLLOWERS, check, upstreams
from test_attention import eager, fused, masks, sample
from test_attention_options import varlen_eager

import fastvit
from fastvit import ops

LOW = (torch.float16, torch.bfloat16)
BF16 = torch.bfloat16
# batch, heads, tokens, head dim: every padded head dim, and every tail of 8 keys and 16 or 32 rows
SHAPES = [
    (1, 1, 1, 32), (2, 1, 8, 40), (1, 2, 15, 48), (2, 3, 16, 56), (1, 1, 17, 64), (1, 2, 50, 64), (1, 2, 65, 72),
    (2, 1, 33, 80), (1, 1, 40, 88), (1, 2, 24, 96), (1, 1, 49, 104), (2, 1, 31, 112), (1, 1, 57, 120), (1, 2, 47, 128),
    (1, 1, 197, 64), (1, 1, 23, 16), (1, 1, 130, 8),
]  # fmt: skip
# The least shared memory (long pairs come by in stages), one multiprocessor (several heads to a block), a large device.
DEVICES = {"stages": (132, 99 * 1024), "heads share": (1, 227 * 1024), "whole": (132, 227 * 1024)}


@pytest.fixture(params=DEVICES)
def device(request, cuda_place):
    """Emulated devices on which the same call takes different ways; a GPU is what it is."""
    if cuda_place.device == "cuda":
        if request.param != "whole":
            pytest.skip("GPU: its memory is what it is, and larger shapes take the other ways")
        yield cuda_place
        return
    with emulated.device(*DEVICES[request.param]):
        yield cuda_place


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_parity(cuda_place, dtype, shape):
    # of one token the exact gradient of q and k is 0, so there is no eager error to measure ours by
    check(cuda_place, dtype, fused, eager, sample(*shape), gradients=shape[2] > 1)


@pytest.mark.parametrize("shape", [(1, 2, 197, 64), (2, 2, 100, 128), (1, 1, 145, 80), (5, 2, 20, 32)], ids=str)
def test_every_way_through_memory(device, shape):
    check(device, BF16, fused, eager, sample(*shape))


@pytest.mark.parametrize("keys", [1, 9, 200])
def test_other_number_of_keys(device, keys):
    check(device, torch.float16, fused, eager, sample(2, 2, 19, 64, keys=keys), gradients=keys > 1)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"scale": -0.2}, {"scale": 0.0}, {"causal": True}], ids=str)
@pytest.mark.parametrize("tokens", [37, 192])
def test_scale_and_causal(device, options, tokens):
    check(
        device,
        BF16,
        lambda q, k, v: fused(q, k, v, **options),
        lambda q, k, v: eager(q, k, v, **options),
        sample(1, 2, tokens, 64),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["padding", "full", "bias", "bias in 16 bits", "additive with holes"])
def test_masks(device, kind, causal):
    mask = masks(2, 2, 77)[kind.removesuffix(" in 16 bits")]
    mask = mask.to(BF16) if kind.endswith("bits") else mask
    check(
        device,
        BF16,
        lambda q, k, v, mask: fused(q, k, v, mask, causal=causal),
        lambda q, k, v, mask: eager(q, k, v, mask, causal=causal),
        sample(2, 2, 77, 48),
        {"mask": mask},
    )


@pytest.mark.parametrize("tokens", [9, 77])
def test_fully_masked_rows_and_hidden_nan(device, tokens):
    """A query that sees no key gives exactly 0, and so does its gradient; what a hidden key holds never shows."""
    q, k, v = (t.to(device.device, BF16) for t in sample(1, 2, tokens, 64).values())
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device.device)
    mask[4], mask[:, 7] = False, False
    k[:, :, 7], v[:, :, 7] = torch.nan, torch.inf
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with fastvit.backend("cuda"):
        out = ops.attention(*leaves, mask=mask)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (out, *grads))
    assert not out[:, :, 4].any()
    assert not grads[0][:, :, 4].any()
    assert not grads[2][:, :, 7].any()


def test_what_a_key_holds_shows_to_those_who_see_it(device):
    q, k, v = (t.to(device.device, torch.float16) for t in sample(1, 1, 30, 32).values())
    mask = torch.ones(30, 30, dtype=torch.bool, device=device.device)
    mask[:10, 7] = False
    v[:, :, 7, 3], v[:, :, 7, 4] = torch.nan, -torch.inf
    with fastvit.backend("cuda"):
        out = ops.attention(q, k, v, mask=mask)[0, 0]
    assert out[:10].isfinite().all()
    assert out[10:, 3].isnan().all()
    assert (out[10:, 4] == -torch.inf).all()
    assert out[10:, 5:].isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_padding_never_leaks(cuda_place, dtype):
    """With V = 1 every row is 1 whatever the scores; near -20 a leaked padding key would take all the weight."""
    for n in (*range(1, 34), 63, 64, 65, 127, 129, 197):
        q = torch.full((1, 1, n, 32), -20.0 / 32, device=cuda_place.device, dtype=dtype)
        k = torch.ones_like(q)
        with fastvit.backend("cuda"):
            out = ops.attention(q, k, k, scale=1.0)
        assert torch.allclose(out.float(), torch.ones_like(out.float()), atol=4e-3), n


def test_scores_that_grow_and_fall(device):
    """Rows whose largest score comes first, last, or climbs from key to key, far beyond what exp can hold."""
    n = 90
    q, v = torch.ones(1, 1, n, 32), torch.randn(1, 1, n, 32)
    for slope in (40.0, -40.0, 0.5, -0.5):
        k = (slope * torch.arange(n, dtype=torch.float32))[:, None].expand(n, 32)[None, None] / 32
        q16, k16, v16 = (t.to(device.device, torch.float16) for t in (q, k, v))
        with fastvit.backend("cuda"):
            out = ops.attention(q16, k16, v16, scale=1.0)
        want = eager(*(t.double().cpu() for t in (q16, k16, v16)), scale=1.0)
        assert torch.allclose(out.double().cpu(), want, atol=2e-3)


@pytest.mark.parametrize("lengths", [[5, 1, 30], [0, 17, 0, 64, 3], [180, 20]], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(device, lengths, causal):
    total, heads = sum(lengths), 2
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    check(
        device,
        BF16,
        lambda qkv, cu: ops.attention_varlen(qkv, cu, max(lengths), heads, causal=causal),
        lambda qkv, cu: varlen_eager(qkv, lengths, heads, causal=causal),
        {"qkv": torch.randn(total, 3 * heads * 40, dtype=torch.float64)},
        {"cu": cu},
    )


def test_lengths_are_not_believed(device):
    """Whatever the table holds, nothing outside of the tensors is touched."""
    qkv = torch.randn(40, 3 * 64, dtype=BF16, device=device.device)
    cu = torch.tensor([-5, 10, 900, 20, 2**31 - 1], dtype=torch.int32, device=device.device)
    with fastvit.backend("cuda"):
        ops.attention_varlen(qkv.requires_grad_(), cu, 25, 2).sum().backward()


def test_incoming_gradients(cuda_place):
    qkv = torch.randn(2, 13, 3 * 2 * 32, dtype=BF16, device=cuda_place.device, requires_grad=True)
    with fastvit.backend("cuda"):
        out = ops.attention_packed(qkv, 2)
        for name in FOLLOWERS:
            odd = upstreams(out)[name]
            plain = odd.clone(memory_format=torch.contiguous_format)
            got, want = (torch.autograd.grad(out, qkv, dy, retain_graph=True)[0] for dy in (odd, plain))
            assert torch.equal(got, want), name


@pytest.mark.parametrize("tokens", [20, 160])
def test_batch_order_and_repetition_do_not_change_a_bit(device, tokens):
    qkv = torch.randn(4, tokens, 3 * 64, dtype=torch.float16, device=device.device)
    dout = torch.randn(4, tokens, 64, dtype=torch.float16, device=device.device)

    def call(qkv, dout):
        qkv = qkv.detach().requires_grad_()
        with fastvit.backend("cuda"):
            out = ops.attention_packed(qkv, 2)
        return out, *torch.autograd.grad(out, qkv, dout)

    first = call(qkv, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, call(qkv, dout), strict=True))
    order = torch.tensor([2, 0, 3, 1], device=device.device)
    assert all(torch.equal(a[order], b) for a, b in zip(first, call(qkv[order], dout[order]), strict=True))


def test_views_and_what_lies_around_them(device):
    """Slices of a tensor of NaN: what is outside the view never shows, and gradients go to the right places."""
    arena = torch.full((3, 40, 5, 4, 64), torch.nan, dtype=BF16, device=device.device)
    view = arena[1:, 3:36, 1:4, 1:3]
    view.copy_(torch.randn(view.shape))
    q, k, v = (t.transpose(1, 2) for t in view.unbind(2))
    plain = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in (q, k, v)]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with fastvit.backend("cuda"):
        got, want = ops.attention(*leaves), ops.attention(*plain)
        dout = torch.randn_like(want)
        grads, want_grads = torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, plain, dout)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))
    expanded = [t[:1].expand(3, -1, -1, -1) for t in (q, k, v)]
    with fastvit.backend("cuda"):
        assert torch.equal(ops.attention(*expanded)[2], want[0])


@pytest.mark.parametrize("shape", [(0, 2, 5, 32), (2, 2, 0, 32), (2, 0, 5, 32)], ids=str)
def test_empty(cuda_place, shape):
    q = torch.randn(shape, dtype=BF16, device=cuda_place.device, requires_grad=True)
    keys = torch.randn(*shape[:2], 0, 32, dtype=BF16, device=cuda_place.device, requires_grad=True)
    with fastvit.backend("cuda"):
        out = ops.attention(q, q, q)
        out.sum().backward()
        blind = ops.attention(q, keys, keys)
        blind.sum().backward()
    assert out.shape == blind.shape == shape
    assert not blind.any()
    assert not q.grad.any()


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("computes in float16, bfloat16, got float32", lambda q: (q.float(), {})),
        ("multiples of 8 up to 128, got 60", lambda q: (q[..., :60], {})),
        ("multiples of 8 up to 128, got 136", lambda q: (torch.cat([q, q, q], -1)[..., :136], {})),
        ("heads of q to begin at multiples of 16 bytes", lambda q: (q[..., 1:33], {})),
        ("heads of q to begin at multiples of 16 bytes", lambda q: (torch.cat([q, q[..., :1]], -1)[..., :64], {})),
        ("has no dropout", lambda q: (q, {"dropout": 0.1})),
    ],
)
def test_refusals(cuda_place, reason, call):
    q, options = call(torch.randn(1, 2, 5, 64, dtype=BF16, device=cuda_place.device))
    assert reason in fastvit.why_not("attention", q, q, q, backend="cuda", **options)
    if not options:
        with fastvit.backend("cuda"), pytest.raises(fastvit.BackendError, match=reason):
            ops.attention(q, q, q)


def test_statistics(cuda_place):
    """lse, on which the backward stands: log Σ exp of each row's scores, -inf for a row that sees nothing."""
    q, k, v = (t.to(cuda_place.device, BF16) for t in sample(1, 2, 20, 32).values())
    mask = torch.rand(20, 20) > 0.5
    mask[3] = False
    implementation = fastvit.backends.implementation("attention", "cuda")
    mask_there = mask.to(q.device).expand(1, 2, 20, 20)
    _, lse = implementation.forward(q, k, v, mask_there, False, 0.2, 0.0, *[None] * 8, 0)
    scores = (q.double() @ k.double().mT).cpu() * 0.2
    want = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    assert torch.allclose(lse.double().cpu(), want, atol=1e-5)
