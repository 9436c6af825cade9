"""What every op owes PyTorch: opcheck, compile without graph breaks, autocast, export, no silent second derivative."""

import pytest
import torch
from harness import places

import fastvit
from fastvit import ops


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def layer_norm_case(place):
    x, r, s, w, b = tensors((6, 32), (6, 32), (32,), (32,), (32,))
    keep = torch.tensor([0.0, 1.25, 1.25]) if place.backend == "triton" else None
    return torch.ops.fastvit.layer_norm, (x, r, s, w, b, 1e-6, keep, place.backend)


def attention_case(place):
    (packed,) = tensors((2, 7, 3, 2, 16))
    mask = torch.rand(2, 1, 1, 7).gt(0.2).expand(2, 2, 7, 7)
    return torch.ops.fastvit.attention, (packed, None, None, mask, False, 0.25, place.backend)


def attention_unpacked_case(place):
    q, k, v = tensors((1, 2, 5, 16), (1, 2, 9, 16), (1, 2, 9, 16))
    return torch.ops.fastvit.attention, (q, k, v, None, True, 0.25, place.backend)


def linear_case(place):
    x, w, b, s, r = tensors((6, 24), (16, 24), (16,), (16,), (6, 16))
    keep = torch.tensor([0.0, 1.25]) if place.backend == "triton" else None
    return torch.ops.fastvit.linear, (x, w, b, s, r, "gelu", True, keep, place.backend)


def norm_mlp_case(place):
    args = tensors((6, 16), (16,), (16,), (24, 16), (24,), (16, 24), (16,), (16,))
    scale = torch.tensor([0.0, 2.0]) if place.backend == "triton" else None
    return torch.ops.fastvit.norm_mlp, (*args, 1e-6, "gelu", True, True, scale, place.backend)


def patch_embed_case(place):
    image, w, b, pos, prefix = tensors((2, 3, 8, 8), (16, 3, 4, 4), (16,), (5, 16), (1, 16))
    return torch.ops.fastvit.patch_embed, (image, w, b, pos, prefix, None, None, place.backend)


CASES = [
    pytest.param(case, *place.values, id=f"{case.__name__.removesuffix('_case')}-{place.id}", marks=place.marks)
    for case, op in (
        (layer_norm_case, "layer_norm"),
        (attention_case, "attention"),
        (attention_unpacked_case, "attention"),
        (linear_case, "linear"),
        (norm_mlp_case, "norm_mlp"),
        (patch_embed_case, "patch_embed"),
    )
    for place in places(op)
    if place.values[0].backend != "reference" and place.values[0].device == "cpu"
]


@pytest.mark.parametrize(("case", "place"), CASES)
def test_opcheck(case, place):
    op, args = case(place)
    torch.library.opcheck(op, args)


def public_calls():
    """One call of every public function, differentiable in its first argument."""
    image, conv, pos, prefix = tensors((2, 3, 8, 8), (16, 3, 4, 4), (1, 5, 16), (1, 1, 16))
    x, w, b, w1, b1, w2 = tensors((2, 5, 16), (16,), (16,), (24, 16), (24,), (16, 24))
    return (
        {
            "layer_norm": lambda x=x: ops.layer_norm(x, w, b),
            "add_layer_norm": lambda x=x: ops.add_layer_norm(x, x.detach(), w, b, layer_scale=w)[0],
            "attention": lambda x=x: ops.attention(*[x.view(2, 5, 2, 8).transpose(1, 2)] * 3),
            "attention_packed": lambda x=x: ops.attention_packed(torch.cat([x, x, x], -1), 2),
            "linear": lambda x=x: ops.linear(x, w1, b1, activation="gelu"),
            "norm_mlp": lambda x=x: ops.norm_mlp(x, w, b, w1, b1, w2, b, layer_scale=b),
            "patch_embed": lambda x=image: ops.patch_embed(x, conv, b, pos, prefix),
        },
        {"patch_embed": image},
        x,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", list(public_calls()[0]))
def test_compiles_in_one_graph(name, backend):
    if not fastvit.is_available(backend) or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip(f"GPU: {backend} does not run on CPU tensors here")
    calls, inputs, default = public_calls()
    call, x = calls[name], inputs.get(name, default)
    torch._dynamo.reset()
    with fastvit.backend(backend):
        compiled = torch.compile(lambda t: call(t).sin(), fullgraph=True, backend="aot_eager")
        want, got = call(x).sin(), compiled(x)
        assert torch.allclose(got, want, atol=1e-5)
        (a,) = torch.autograd.grad(want.sum(), x, retain_graph=True)
        (b,) = torch.autograd.grad(got.sum(), x)
    assert torch.allclose(a, b, atol=1e-4)


def test_compile_follows_the_override_and_the_batch():
    """Another backend recompiles; batch sizes cost at most two compilations."""
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    weight = torch.randn(16, 16)
    compiled = torch.compile(lambda x: ops.linear(x, weight), fullgraph=True, backend=counter)
    with fastvit.backend("reference"):
        for batch in (2, 3, 5, 8):
            compiled(torch.randn(batch, 16))
    assert counter.frame_count <= 2
    before = counter.frame_count
    if fastvit.is_available("cpu"):
        with fastvit.backend("cpu"):
            x = torch.randn(3, 16)
            assert torch.allclose(compiled(x), ops.linear(x, weight), atol=1e-5)
        assert counter.frame_count > before


@pytest.mark.parametrize("name", list(public_calls()[0]))
def test_second_derivative_is_right_or_raises(name):
    calls, inputs, default = public_calls()
    call, x = calls[name], inputs.get(name, default)
    with fastvit.backend("reference"):
        (grad,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
        if "attention" in name:  # torch's own fused attention on the CPU has none either
            with pytest.raises(RuntimeError, match="is not implemented"):
                torch.autograd.grad(grad.square().sum(), x)
        else:
            assert torch.autograd.grad(grad.square().sum(), x)[0].isfinite().all()
    if fastvit.is_available("cpu"):
        with fastvit.backend("cpu"):
            (grad,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad|not differentiable"):
                torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.parametrize("name", list(public_calls()[0]))
def test_autocast_gives_the_dtypes_of_torch(name):
    calls, inputs, default = public_calls()
    call, x = calls[name], inputs.get(name, default)
    results = []
    for backend in ("reference", "auto"):
        with fastvit.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            y = call()
        results.append(y)
        (grad,) = torch.autograd.grad(y.float().sum(), x)
        assert grad.dtype == torch.float32
    assert results[0].dtype == results[1].dtype
    assert torch.allclose(results[0].float(), results[1].float(), atol=0.1, rtol=0.05)
    narrow = {"attention", "attention_packed", "linear"}
    assert results[0].dtype == (torch.bfloat16 if name in narrow else torch.float32)


def test_autocast_is_off_for_fp64_and_off_outside():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(torch.randn(2, 4).double(), torch.randn(3, 4).double()).dtype == torch.float64
    assert ops.linear(torch.randn(2, 4), torch.randn(3, 4)).dtype == torch.float32


def test_export_goes_through_the_reference():
    model = fastvit.create_model("vit_tiny_patch16_224", depth=2).eval()
    x = torch.randn(1, 3, 224, 224)
    with fastvit.backend("reference"), torch.no_grad():
        exported = torch.export.export(model, (x,))
        assert torch.equal(exported.module()(x), model(x))
    assert not any("fastvit" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("name", list(public_calls()[0]))
def test_two_runs_are_bit_equal(name):
    call = public_calls()[0][name]
    assert torch.equal(call(), call())


def test_functional_transforms_are_right_or_clear():
    x, w, b = torch.randn(3, 4, 16), torch.randn(16), torch.randn(16)
    with fastvit.backend("reference"):
        want = torch.stack([ops.layer_norm(t, w, b) for t in x])
        assert torch.allclose(torch.func.vmap(lambda t: ops.layer_norm(t, w, b))(x), want, atol=1e-6)
