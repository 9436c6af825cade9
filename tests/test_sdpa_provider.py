"""Our kernels as PyTorch's flash attention: ATen's operators on CPU tensors, and the registry's protocol."""

import pytest
import torch
from tolerances import assert_close

import fastvit
from fastvit import backends
from fastvit.integrations import pytorch

NAME = "_scaled_dot_product_flash_attention"
registry = pytest.importorskip("torch.nn.attention._registry")


def tensors(dtype=torch.float32, heads=3, kv_heads=3, tokens=7, keys=7, layout="BNHE"):
    """q, k, v (B, heads, tokens, 16) and an upstream gradient; random, in one of the layouts that models make."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, tokens, 16), (2, kv_heads, keys, 16), (2, kv_heads, keys, 16), (2, heads, tokens, 16))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    if layout == "BNHE":
        made = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]
    if layout == "packed":
        made[:3] = (t.transpose(1, 2) for t in torch.stack([t.transpose(1, 2) for t in made[:3]], 2).unbind(2))
    if layout == "last dimension apart":
        made = [t.mT.contiguous().mT for t in made]
    return made


def mathematics(q, k, v, dout, causal=False, scale=None):
    """(out, logsumexp, dq, dk, dv) in fp64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(groups, 1)
    return out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, (q, k, v), dout.double())


def eager(q, k, v, dout, **kwargs):
    """PyTorch's own."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    kwargs["is_causal"] = kwargs.pop("causal", False)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kwargs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def served(provider, q, k, v, dout, causal=False, scale=None):
    out, lse, *rest = provider.forward(q, k, v, 0.0, causal, scale=scale)
    grads = provider.backward(dout, q, k, v, out, lse, *rest[:4], 0.0, causal, *rest[4:6], scale=scale)
    return out, lse, *grads


def check(provider, q, k, v, dout, **kwargs):
    out, lse, *grads = served(provider, q, k, v, dout, **kwargs)
    exact, yardstick = mathematics(q, k, v, dout, **kwargs), eager(q, k, v, dout, **kwargs)
    assert_close("out", out, exact[0], yardstick[0])
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5 if q.dtype == torch.float32 else 1e-2)
    for name, got, t, want, base in zip("qkv", grads, (q, k, v), exact[2:], yardstick[1:], strict=True):
        assert_close(f"d{name}", got, want, base, gradient=True)
        assert got.stride() == torch.empty_like(t).stride()
    assert out.stride() == torch.empty_like(q).stride()


CASES = [
    {},
    {"causal": True, "scale": 0.3},
    {"keys": 11, "layout": "BHNE"},
    {"layout": "packed"},
    {"heads": 4, "kv_heads": 2, "causal": True},
    {"layout": "last dimension apart"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_forward_and_backward_in_fp32(backend, case):
    reason = backends.why_unavailable(backend)
    if reason:
        pytest.skip(reason)
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("GPU: Triton is not interpreted here")
    call = {name: case[name] for name in ("causal", "scale") if name in case}
    check(pytorch.Provider((backend,)), *tensors(**{n: x for n, x in case.items() if n not in call}), **call)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_of_the_cuda_kernels(cuda_place, case):
    call = {name: case[name] for name in ("causal", "scale") if name in case}
    made = tensors(torch.bfloat16, **{n: x for n, x in case.items() if n not in call})
    check(pytorch.Provider(("cuda",)), *(t.to(cuda_place.device) for t in made), **call)


@pytest.fixture
def on_cpu():
    """The overrides as they are registered for CUDA, for CPU tensors, where PyTorch has no such operators."""
    reason = backends.why_unavailable("cpu")
    if reason:
        pytest.skip(reason)
    handle = pytorch._override(pytorch.Provider(("cpu",)), "CPU")
    assert has_kernel("CPU") == [True, True]
    yield
    handle.remove()
    assert has_kernel("CPU") == [False, False]


def has_kernel(key):
    return [torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{NAME}{end}", key) for end in ("", "_backward")]


def test_atens_schema_and_autograd_take_what_we_return(on_cpu):
    q, k, v, dout = tensors()
    want = mathematics(q, k, v, dout, causal=True)
    for t in (q, k, v):
        t.requires_grad_()
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    fake = torch.ops.aten._scaled_dot_product_flash_attention(*(t.to("meta") for t in (q, k, v)), 0.0, True)
    for ours, meta in zip(result, fake, strict=True):
        if isinstance(ours, torch.Tensor):
            assert (ours.shape, ours.dtype, ours.stride()) == (meta.shape, meta.dtype, meta.stride())
        else:
            assert ours == meta
    grads = torch.autograd.grad(result[0], (q, k, v), dout)
    for got, exact in zip((*result[:2], *grads), want, strict=True):
        torch.testing.assert_close(got.detach().double(), exact, rtol=1e-4, atol=1e-4)


def test_dropout_draws_a_seed_that_backward_repeats(on_cpu):
    q, k, v, dout = tensors(tokens=5, keys=5)
    provider = pytorch.Provider(("triton",))
    if backends.why_unavailable("triton"):
        pytest.skip(backends.why_unavailable("triton"))
    torch.manual_seed(3)
    out, lse, *rest = provider.forward(q, k, v, 0.5)
    assert not torch.allclose(out, provider.forward(q, k, v, 0.5)[0])
    torch.manual_seed(3)
    assert torch.equal(out, provider.forward(q, k, v, 0.5)[0])
    assert rest[4].dtype == torch.uint64 and rest[4].shape == (2,)
    kept = provider.forward(q, k, torch.eye(5, 16).expand(2, 3, 5, 16), 0.0)[0][..., :5]
    torch.manual_seed(3)
    dropped = provider.forward(q, k, torch.eye(5, 16).expand(2, 3, 5, 16), 0.5)[0][..., :5] / kept
    assert set(dropped.round(decimals=3).unique().tolist()) == {0.0, 2.0}
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    want = torch.autograd.grad((q @ k.mT / 4).softmax(-1).mul(dropped) @ v, (q, k, v), dout)
    q, k, v = (t.detach() for t in (q, k, v))
    got = provider.backward(dout, q, k, v, out, lse, *rest[:4], 0.5, False, *rest[4:6])
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_what_no_kernel_takes_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda op, args, name: f"{name} has had enough")
    provider = pytorch.Provider(("triton", "cuda"))
    q, k, v, _ = tensors(keys=9)
    for arguments, reason in [
        ((q, k, v, 0.0, True), "as many keys as queries"),
        ((q, k, v[..., :8]), "key and value alike"),
        ((q, k[:1], v[:1]), "query's batch"),
        ((q, k[:, :2], v[:, :2]), "heads that divide"),
        ((q, k, v), "triton has had enough; cuda has had enough"),
        ((q, k, v, 0.0, False, True), "return_debug_mask"),
    ]:
        with pytest.raises(fastvit.BackendError, match=f"fastvit as flash attention: .*{reason}.*restore_flash"):
            provider.forward(*arguments)


@pytest.fixture
def offered(monkeypatch):
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_IMPLS", dict(registry._FLASH_ATTENTION_IMPLS))
    pytorch.register()
    yield
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


@pytest.fixture
def as_if_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "why_unavailable", lambda name: "it was not built" if name == "cuda" else None)


def test_registering_offers_and_activates_nothing(offered):
    pytorch.register()
    assert torch.nn.attention.list_flash_attention_impls().count("fastvit") == 1
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPU: this machine has one")
def test_without_cuda_activating_is_an_error(offered):
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        torch.nn.attention.activate_flash_attention_impl("fastvit")
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_activating_and_restoring(offered, as_if_cuda):
    before = has_kernel("CUDA")
    for _ in range(2):
        torch.nn.attention.activate_flash_attention_impl("fastvit")
        assert torch.nn.attention.current_flash_attention_impl() == "fastvit"
        assert has_kernel("CUDA") == [True, True]
        torch.nn.attention.restore_flash_attention_impl()
        assert torch.nn.attention.current_flash_attention_impl() is None
        assert has_kernel("CUDA") == before


def test_activating_asks_for_the_backends(offered, as_if_cuda, monkeypatch):
    chosen = []
    monkeypatch.setattr(pytorch, "_override", lambda provider, key: chosen.append((provider.candidates, key)))
    torch.nn.attention.activate_flash_attention_impl("fastvit")
    assert chosen == [(("triton",), "CUDA")]
    for backend, reason in [("cuda", "it was not built"), ("reference", "computes on no GPU")]:
        with pytest.raises(fastvit.BackendError, match=reason), fastvit.backend(backend):
            torch.nn.attention.activate_flash_attention_impl("fastvit")
    monkeypatch.setattr(pytorch, "SETTINGS", type("Off", (), {"disable": True}))
    torch.nn.attention.activate_flash_attention_impl("fastvit")
    assert len(chosen) == 1


def test_an_older_pytorch_is_told(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="register_flash_attention_impl, found"):
        pytorch.register()
