"""What every op owes PyTorch: opcheck, compile without graph breaks, autocast, export, no silent second derivative."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from calls import CALLS, PUBLIC, calls
from harness import places, random_like
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import backends, ops


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def layer_norm_case(place):
    x, r, s, w, b = tensors((6, 32), (6, 32), (32,), (32,), (32,))
    keep = torch.tensor([0.0, 1.25, 1.25]) if place.backend == "triton" else None
    return torch.ops.fastvit.layer_norm, (x, r, s, w, b, 1e-6, keep, place.backend)


def group_norm_case(place):
    x, w, b = tensors((2, 6, 5), (6,), (6,))
    return torch.ops.fastvit.group_norm, (x, 3, w, b, 1e-5, True, place.backend)


def group_norm_channels_last_case(place):
    x, b = tensors((2, 5, 6), (6,))
    return torch.ops.fastvit.group_norm, (x.detach().mT.requires_grad_(), 3, None, b, 1e-5, False, place.backend)


PLAIN_ATTENTION = (0.0, *[None] * 8, 0)


def attention_case(place):
    (packed,) = tensors((2, 7, 3, 2, 16))
    mask = torch.rand(2, 1, 1, 7).gt(0.2).expand(2, 2, 7, 7)
    return torch.ops.fastvit.attention, (packed, None, None, mask, False, 0.25, *PLAIN_ATTENTION, place.backend)


def attention_unpacked_case(place):
    q, k, v = tensors((1, 2, 5, 16), (1, 2, 9, 16), (1, 2, 9, 16))
    return torch.ops.fastvit.attention, (q, k, v, None, True, 0.25, *PLAIN_ATTENTION, place.backend)


def attention_norm_case(place):
    (packed,) = tensors((2, 7, 3, 2, 16))
    norms = tensors((16,), (16,), (16,))
    options = (0.0, None, *norms, None, 1e-6, 1e-5, None, 0)
    return torch.ops.fastvit.attention, (packed, None, None, None, False, 0.25, *options, place.backend)


def attention_varlen_case(place):
    (packed,) = tensors((1, 11, 3, 2, 16))
    cu_seqlens = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    options = (0.0, *[None] * 7, cu_seqlens, 7)
    return torch.ops.fastvit.attention, (packed, None, None, None, False, 0.25, *options, place.backend)


def attention_dropout_case(place):
    q, k, v = tensors((1, 2, 5, 16), (1, 2, 9, 16), (1, 2, 9, 16))
    options = (0.3, torch.tensor([7]), *[None] * 7, 0)
    return torch.ops.fastvit.attention, (q, k, v, None, False, 0.25, *options, place.backend)


def linear_case(place):
    x, w, b, s, r = tensors((6, 24), (16, 24), (16,), (16,), (6, 16))
    keep = torch.tensor([0.0, 1.25]) if place.backend == "triton" else None
    return torch.ops.fastvit.linear, (x, w, b, s, r, "gelu", True, keep, place.backend)


def norm_mlp_case(place):
    args = tensors((6, 16), (16,), (16,), (24, 16), (24,), (16, 24), (16,), (16,))
    scale = torch.tensor([0.0, 2.0]) if place.backend == "triton" else None
    return torch.ops.fastvit.norm_mlp, (*args, 1e-6, "gelu", True, True, scale, place.backend)


def encoder_case(place):
    block = [t.detach() for t in tensors(*CALLS["encoder"][1].values())]
    return torch.ops.fastvit.encoder, (block[0], block[1:], [1e-6, 1e-6], 2, 0.35, "gelu", "float32", [], place.backend)


def block_case(place):
    block = tensors(*CALLS["encoder"][1].values())
    return torch.ops.fastvit.block, (*block, [1e-6, 1e-6], 2, 0.35, "gelu", "float32", place.backend)


def patch_embed_case(place):
    image, w, b, pos, prefix = tensors((2, 3, 8, 8), (16, 3, 4, 4), (16,), (5, 16), (1, 16))
    return torch.ops.fastvit.patch_embed, (image, w, b, pos, prefix, None, None, place.backend)


OP_CASES = (
    (layer_norm_case, "layer_norm"),
    (group_norm_case, "group_norm"),
    (group_norm_channels_last_case, "group_norm"),
    (attention_case, "attention"),
    (attention_unpacked_case, "attention"),
    (linear_case, "linear"),
    (norm_mlp_case, "norm_mlp"),
    (encoder_case, "encoder"),
    (block_case, "encoder"),
    (patch_embed_case, "patch_embed"),
)
CASES = [
    pytest.param(case, *place.values, id=f"{case.__name__.removesuffix('_case')}-{place.id}", marks=place.marks)
    for case, op in OP_CASES
    for place in places(op)
    if place.values[0].backend != "reference"
]
each_call = pytest.mark.parametrize("call", calls())


def test_no_op_and_no_public_function_is_left_out():
    assert {op for _, op in OP_CASES} == set(backends.OPS)
    assert set(CALLS) == set(PUBLIC)


@pytest.mark.parametrize(("case", "place"), CASES)
def test_opcheck(case, place):
    op, args = case(place)
    there = [
        a.detach().to(place.device).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args
    ]
    results = torch.library.opcheck(op, tuple(there))
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


@each_call
def test_compiles_in_one_graph(call):
    torch._dynamo.reset()
    tensors = call.tensors()
    with fastvit.backend(call.place.backend):
        want = call.function(**tensors).sin()
        got = torch.compile(lambda **t: call.function(**t).sin(), fullgraph=True, backend="aot_eager")(**tensors)
    assert torch.allclose(got, want, atol=1e-5)
    for name, w, g in zip(tensors, call.gradients(tensors, want), call.gradients(tensors, got), strict=True):
        assert torch.allclose(g, w, atol=1e-4), name


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


@each_call
def test_second_derivative_is_right_or_raises(call):
    tensors = call.tensors()
    first = next(iter(tensors.values()))
    (grad,) = torch.autograd.grad(call.run(tensors).square().sum(), first, create_graph=True)
    if call.place.backend != "reference":
        with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad|not differentiable"):
            torch.autograd.grad(grad.square().sum(), first)
    elif call.name == "encoder" or "attention" in call.name:  # torch's own fused attention has none either
        with pytest.raises(RuntimeError, match="is not implemented"):
            torch.autograd.grad(grad.square().sum(), first)
    else:
        assert torch.autograd.grad(grad.square().sum(), first)[0].isfinite().all()


def eager_attention(qkv):
    q, k, v = qkv.unflatten(-1, (3, 2, 8)).unbind(-3)
    return F.scaled_dot_product_attention(*(t.transpose(-2, -3) for t in (q, k, v))).transpose(-2, -3).flatten(-2)


def eager_norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale):
    hidden = F.gelu(F.linear(F.layer_norm(x, (16,), norm_weight, norm_bias), fc1_weight, fc1_bias))
    return x + layer_scale * F.linear(hidden, fc2_weight, fc2_bias)


def eager_encoder(x, **block):
    b = ops.EncoderBlock(**block)
    qkv = F.linear(F.layer_norm(x, (16,), b.norm1_weight, b.norm1_bias, 1e-6), b.qkv_weight, b.qkv_bias)
    x = x + b.layer_scale1 * F.linear(eager_attention(qkv), b.proj_weight, b.proj_bias)
    mlp = (b.norm2_weight, b.norm2_bias, b.fc1_weight, b.fc1_bias, b.fc2_weight, b.fc2_bias)
    return eager_norm_mlp(x, *mlp, b.layer_scale2)


def eager_add_layer_norm(x, residual, weight, bias, layer_scale):
    z = residual + layer_scale * x
    return torch.cat([F.layer_norm(z, (16,), weight, bias, 1e-6), z])


EAGER = {
    "add_layer_norm": eager_add_layer_norm,
    "attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "attention_packed": eager_attention,
    "attention_varlen": lambda qkv: torch.cat([eager_attention(part) for part in (qkv[:2], qkv[2:])]),
    "encoder": eager_encoder,
    "group_norm": lambda x, weight, bias: F.relu(F.group_norm(x, 2, weight, bias)),
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, (16,), weight, bias, 1e-6),
    "linear": lambda x, weight, bias, layer_scale, residual: residual + layer_scale * F.gelu(F.linear(x, weight, bias)),
    "norm_mlp": eager_norm_mlp,
    "patch_embed": lambda image, weight, bias, pos_embed, prefix: (
        torch.cat([prefix.expand(2, -1, -1), F.conv2d(image, weight, bias, 4).flatten(2).transpose(1, 2)], 1)
        + pos_embed
    ),
}


@each_call
def test_autocast_gives_the_dtypes_and_values_of_torch(call):
    tensors = call.tensors()
    with torch.autocast(call.place.device, dtype=torch.bfloat16):
        want, got = EAGER[call.name](**tensors), call.run(tensors)
    assert got.dtype == want.dtype
    assert torch.allclose(got.float(), want.float(), atol=0.1, rtol=0.05)
    for name, gradient in zip(tensors, call.gradients(tensors, got), strict=True):
        assert gradient.dtype == torch.float32, name


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


def results(call, through=None, **options):
    """Output and every gradient, with the random numbers of one seed; through checkpoint's options, or without it."""
    torch.manual_seed(1)
    tensors = call.tensors()
    if through is None:
        output = call.run(tensors, **options)
    else:
        names, leaves = list(tensors), tensors.values()
        output = checkpoint(lambda *t: call.run(dict(zip(names, t, strict=True)), **options), *leaves, **through)
    output.backward(random_like(output).to(output))
    return {"output": output, **{name: t.grad for name, t in tensors.items()}}


@each_call
def test_two_runs_are_bit_equal(call):
    first, second = results(call), results(call)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_call
def test_checkpointing_changes_no_bit(call, use_reentrant):
    taken = inspect.signature(getattr(ops, call.name)).parameters
    for options in ({}, {"drop_path": 0.5}, {"dropout": 0.5}):
        if set(options) <= set(taken):
            plain, saved = results(call, **options), results(call, {"use_reentrant": use_reentrant}, **options)
            assert not [name for name in plain if not torch.equal(plain[name], saved[name])], options


def test_functional_transforms_are_right_or_clear():
    x, w, b = torch.randn(3, 4, 16), torch.randn(16), torch.randn(16)
    with fastvit.backend("reference"):
        want = torch.stack([ops.layer_norm(t, w, b) for t in x])
        assert torch.allclose(torch.func.vmap(lambda t: ops.layer_norm(t, w, b))(x), want, atol=1e-6)
