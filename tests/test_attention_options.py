"""What attention can do besides: packed qkv with norms, images of several lengths in one row, dropout."""

import pytest
import torch
import torch.nn.functional as F
from harness import check, dtypes_of
from test_attention import PLACES, TRITON, eager, sample
from torch import Tensor

import fastvit
from fastvit import ops


def packed_eager(qkv, num_heads, norms=()):
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (F.layer_norm(t, t.shape[-1:], *n) for t, n in zip((q, k), norms, strict=True)) if norms else (q, k)
    return eager(q, k, v).transpose(1, 2).reshape(batch, tokens, width // 3)


@pytest.mark.parametrize("place", PLACES)
def test_packed(place):
    tensors = {"qkv": torch.randn(2, 19, 3 * 2 * 32, dtype=torch.float64)}
    for dtype in dtypes_of(place):
        check(place, dtype, lambda qkv: ops.attention_packed(qkv, 2), lambda qkv: packed_eager(qkv, 2), tensors)


def norm_tensors(tokens, head_dim, images=1):
    tensors: dict[str, Tensor | None] = {"qkv": torch.randn(images, tokens, 3 * 2 * head_dim, dtype=torch.float64)}
    return tensors | {name: torch.randn(head_dim, dtype=torch.float64) for name in ("qw", "qb", "kw")}


@pytest.mark.parametrize(("images", "tokens"), [(2, 19), (1, 70)])
@pytest.mark.parametrize("place", PLACES)
def test_packed_with_query_and_key_norm(place, images, tokens):
    def op(qkv, qw, qb, kw):
        return ops.attention_packed(qkv, 2, q_norm=(qw, qb, 1e-6), k_norm=(kw, kw.detach(), 1e-1))

    def plain(qkv, qw, qb, kw):
        return packed_eager(qkv, 2, ((qw, qb, 1e-6), (kw, kw.detach(), 1e-1)))

    for dtype in dtypes_of(place):
        check(place, dtype, op, plain, norm_tensors(tokens, 32, images) | {"qb": None})
        check(place, dtype, op, plain, norm_tensors(tokens, 80, images))


@pytest.mark.parametrize("place", PLACES)
def test_the_bias_of_the_keys_norm_shifts_all_scores_alike(place):
    """Its exact gradient is 0, so there is no eager error to measure ours by."""
    tensors = {name: t.float().to(place.device).requires_grad_() for name, t in norm_tensors(30, 32).items()}
    bias = torch.randn(32, device=place.device, requires_grad=True)
    with fastvit.backend(place.backend):
        norms = {"q_norm": (tensors["qw"], tensors["qb"], 1e-6), "k_norm": (tensors["kw"], bias, 1e-6)}
        out = ops.attention_packed(tensors["qkv"], 2, **norms)
        dbias, dweight = torch.autograd.grad(out.sin().sum(), (bias, tensors["kw"]))
    assert dweight.abs().max() * 1e-4 > 0
    assert dbias.abs().max() < dweight.abs().max() * 1e-4


@pytest.mark.parametrize("place", PLACES)
def test_one_norm_without_parameters(place):
    tensors = {"qkv": 3 + torch.randn(1, 21, 3 * 2 * 24, dtype=torch.float64)}
    for option, eps in (("q_norm", 0.0), ("k_norm", 0.5)):

        def plain(qkv, _option=option, _eps=eps):
            q, k, v = qkv.reshape(1, 21, 3, 2, 24).permute(2, 0, 3, 1, 4)
            q, k = (
                F.layer_norm(t, (24,), eps=_eps) if _option == name else t for t, name in ((q, "q_norm"), (k, "k_norm"))
            )
            return eager(q, k, v).transpose(1, 2).reshape(1, 21, 48)

        def op(qkv, _norm={option: (None, None, eps)}):  # noqa: B006
            return ops.attention_packed(qkv, 2, **_norm)

        check(place, torch.float32, op, plain, tensors)


def varlen_eager(qkv, lengths, num_heads, norms=(), causal=False):
    outputs = []
    for image in qkv.split(lengths):
        q, k, v = image.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        q, k = (F.layer_norm(t, t.shape[-1:], *n) for t, n in zip((q, k), norms, strict=True)) if norms else (q, k)
        outputs.append(eager(q, k, v, causal=causal).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", [[5, 0, 1, 17, 3], [70, 2, 150], [0, 4]], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_varlen(place, lengths):
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tensors = {"qkv": torch.randn(sum(lengths), 3 * 2 * 32, dtype=torch.float64)}

    def op(qkv, cu, **options):
        return ops.attention_varlen(qkv, cu, max(lengths) + 3, 2, **options)

    for dtype in dtypes_of(place):
        check(place, dtype, op, lambda qkv, cu: varlen_eager(qkv, lengths, 2), tensors, {"cu": cu})
    tensors |= {name: torch.randn(32, dtype=torch.float64) for name in ("w", "b")}

    def normed(qkv, cu, w, b):
        return op(qkv, cu, q_norm=(w, b, 1e-5), k_norm=(b, None, 1e-6), causal=True)

    def plain(qkv, cu, w, b):
        return varlen_eager(qkv, lengths, 2, ((w, b, 1e-5), (b, None, 1e-6)), causal=True)

    check(place, torch.float32, normed, plain, tensors, {"cu": cu})


@pytest.mark.parametrize("place", PLACES)
def test_images_of_a_row_do_not_meet(place):
    """NaN in one image stays in it, forward and backward."""
    qkv = torch.randn(12, 3 * 2 * 16, device=place.device)
    qkv[5] = torch.nan
    qkv.requires_grad_()
    cu = torch.tensor([0, 4, 7, 12], dtype=torch.int32, device=place.device)
    with fastvit.backend(place.backend):
        out = ops.attention_varlen(qkv, cu, 5, 2)
        (grad,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    ill = torch.tensor([4, 5, 6], device=place.device)
    well = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10, 11], device=place.device)
    assert out[ill].isnan().all()
    assert out[well].isfinite().all()
    assert grad[well].isfinite().all()


def philox(key, counter):
    """The first word of Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3), in int64."""
    low = 0xFFFFFFFF
    k0, k1 = key & low, key >> 32 & low
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = 0xD2511F53 * c0 >> 32, 0xD2511F53 * c0 & low
        high1, low1 = 0xCD9E8D57 * c2 >> 32, 0xCD9E8D57 * c2 & low
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


def test_philox_is_philox():
    # the known answers of Random123's kat_vectors: counter 0 and key 0; all bits set
    assert philox(0, (0, 0, 0, 0)) == 0x6627E8D5
    assert philox(2**64 - 1, (2**32 - 1,) * 4) == 0x408F276D


def keep_mask(batch, heads, rows, keys, rate):
    """Whether each weight survives, from the seed that a call will draw next; leaves the generator as it was."""
    state = torch.get_rng_state()
    seed = torch.randint(2**63 - 1, (1,)).item()
    torch.set_rng_state(state)
    b, h, row, key = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, rows, keys)), indexing="ij")
    words = [philox(seed, counter) for counter in zip(*(t.flatten().tolist() for t in (key, row, h, b)), strict=True)]
    bits = torch.tensor(words).reshape(batch, heads, rows, keys)
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    uniform = torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
    return uniform >= rate


@pytest.mark.parametrize(("rows", "keys"), [(21, 21), (20, 75)])
@pytest.mark.parametrize("place", TRITON)
def test_dropout_of_the_kernel(place, rows, keys):
    rate = 0.3
    torch.manual_seed(11)
    survives = keep_mask(2, 2, rows, keys, rate)

    def op(q, k, v):
        torch.manual_seed(11)
        return ops.attention(q, k, v, dropout=rate)

    def plain(q, k, v):
        p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        return (torch.where(survives, p, 0) / (1 - rate)) @ v

    for dtype in dtypes_of(place):
        check(place, dtype, op, plain, sample(2, 2, rows, 32, keys=keys))


@pytest.mark.parametrize("place", TRITON)
def test_dropout_follows_the_generator(place):
    q = torch.randn(1, 2, 40, 16, device=place.device)

    def call(seed):
        torch.manual_seed(seed)
        with fastvit.backend(place.backend):
            return ops.attention(q, q, torch.ones_like(q), dropout=0.25)

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    assert abs(call(3).mean().item() - 1) < 0.05


@pytest.mark.parametrize("place", PLACES)
def test_dropout_without_a_kernel_for_it_keeps_the_norms(place):
    qkv = torch.randn(1, 9, 96, device=place.device)
    with fastvit.backend(place.backend):
        out = ops.attention_packed(qkv, 2, q_norm=(None, None, 1e-6), k_norm=(None, None, 1e-6), dropout=1e-9)
        want = ops.attention_packed(qkv, 2, q_norm=(None, None, 1e-6), k_norm=(None, None, 1e-6))
    assert torch.allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("place", TRITON)
def test_norms_wider_than_the_kernel_takes_run_beside_it(place):
    qkv = torch.randn(1, 5, 3 * 200, device=place.device)
    assert "up to 128, got 200" in fastvit.why_not(
        "attention_packed", qkv, 1, q_norm=(None, None, 1e-6), backend=place.backend
    )
    with fastvit.backend(place.backend):
        out = ops.attention_packed(qkv, 1, q_norm=(None, None, 1e-6))
    q, k, v = qkv.view(1, 5, 3, 1, 200).permute(2, 0, 3, 1, 4)
    assert torch.allclose(out, eager(F.layer_norm(q, (200,), eps=1e-6), k, v)[:, 0], atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_autocast_normalises_with_fp32_parameters(place):
    qkv, weight = torch.randn(1, 9, 96), torch.randn(16)
    want = packed_eager(qkv, 2, ((weight, None, 1e-6), (weight, None, 1e-6)))
    norm = (weight.to(place.device), None, 1e-6)
    with fastvit.backend(place.backend), torch.autocast(place.device, dtype=torch.bfloat16):
        out = ops.attention_packed(qkv.to(place.device), 2, q_norm=norm, k_norm=norm)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float().cpu(), want, atol=0.1, rtol=0.05)


def test_dropout_keeps_the_mean_and_needs_no_kernel():
    v = torch.ones(64, 2, 8, 16)
    out = ops.attention(torch.zeros_like(v), torch.zeros_like(v), v, dropout=0.5)
    assert abs(out.mean().item() - 1) < 0.05
    assert out.std() > 0.1
