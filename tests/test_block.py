"""A training block as one op: the output and every gradient against fp64, and what it leaves to the ops."""

import copy

import pytest
import torch
from blocks import block, eager
from models import images, small_timm
from tolerances import assert_close
from torch import Tensor

import fastvit
from fastvit import ops

needs_kernel = pytest.mark.skipif(
    bool(fastvit.backends.why_unavailable("cpu")), reason=str(fastvit.backends.why_unavailable("cpu"))
)
SHAPES = [
    (1, 1, 16, 16, 1),
    (2, 5, 48, 100, 3),
    (3, 17, 40, 33, 5),
    (2, 50, 96, 65, 2),
    (1, 197, 64, 256, 1),
    (2, 29, 21, 7, 3),
]
AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


def run(function, x: Tensor, blocks: list[ops.EncoderBlock], dy: Tensor) -> dict[str, Tensor]:
    """The result, and the gradients of the tokens and of every parameter, by name."""
    leaves = {"tokens": x.detach().clone().requires_grad_()}
    taken = []
    for i, one in enumerate(blocks):
        mine = {
            name: t.detach().clone().to(x.dtype).requires_grad_(t.requires_grad)
            for name, t in one._asdict().items()
            if isinstance(t, Tensor)
        }
        taken.append(one._replace(**mine))
        leaves |= {f"{name} of block {i}": t for name, t in mine.items() if t.requires_grad}
    y = function(leaves["tokens"], taken)
    y.backward(dy.to(y.dtype))
    return {"result": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def check(
    blocks: list[ops.EncoderBlock], batch: int, tokens: int, heads: int, activation="gelu", autocast=False
) -> None:
    g = torch.Generator().manual_seed(tokens)
    width = blocks[0].proj_weight.shape[0]
    x, dy = torch.randn(2, batch, tokens, width, generator=g).unbind(0)
    exact = run(lambda x, b: eager(x, b, heads, activation), x.double(), blocks, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        base = run(lambda x, b: eager(x, b, heads, activation), x, blocks, dy)
        got = run(lambda x, b: ops.encoder(x, b, heads, activation=activation), x, blocks, dy)
    assert got.keys() == exact.keys()
    for name in got:
        assert got[name].dtype == torch.float32, name
        if autocast:  # by the rule of what is computed in
            got[name], base[name] = got[name].bfloat16(), base[name].bfloat16()
        assert_close(name, got[name], exact[name], base[name], gradient=name != "result")


def learning(width: int, hidden: int, seed: int = 0, **absent: None) -> ops.EncoderBlock:
    made = block(width, hidden, seed=seed, **absent)
    for t in made:
        if isinstance(t, Tensor):
            t.requires_grad_()
    return made


def kernels_used(function) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith("fastvit::")}


@AUTOCAST
@pytest.mark.parametrize(("batch", "tokens", "width", "hidden", "heads"), SHAPES)
def test_values_and_gradients(autocast, batch, tokens, width, hidden, heads):
    check([learning(width, hidden, seed) for seed in range(2)], batch, tokens, heads, autocast=autocast)


@AUTOCAST
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "none"])
@pytest.mark.parametrize("absent", [(), ("qkv_bias", "proj_bias", "fc1_bias", "fc2_bias"), ("layer_scale1",)])
def test_options(autocast, activation, absent):
    norms = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "layer_scale2") if not absent else ()
    blocks = [learning(64, 96, 1, **dict.fromkeys(absent)), learning(64, 96, 2, **dict.fromkeys(norms))]
    check(blocks, 2, 23, 2, activation, autocast=autocast)


@needs_kernel
@AUTOCAST
def test_every_instruction_set(isa, autocast):
    check([learning(72, 130)], 2, 33, 3, autocast=autocast)


@needs_kernel
@AUTOCAST
def test_one_op_serves_it_and_bits_do_not_depend_on_threads(autocast, threads):
    blocks, x = [learning(96, 160)], torch.randn(3, 70, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert kernels_used(lambda: ops.encoder(x, blocks, 3)) == {"fastvit::block"}
        threads(1)
        want = run(lambda x, b: ops.encoder(x, b, 3), x, blocks, torch.ones_like(x))
        for count in (2, 3):
            threads(count)
            got = run(lambda x, b: ops.encoder(x, b, 3), x, blocks, torch.ones_like(x))
            assert not [name for name in want if not torch.equal(got[name], want[name])]


@AUTOCAST
@pytest.mark.parametrize("learns", [("norm1_weight",), ("qkv_bias", "fc2_bias"), ("layer_scale1", "fc1_weight"), ()])
def test_frozen_parameters_get_no_gradient(autocast, learns):
    made = block(48, 80)
    for name in learns:
        getattr(made, name).requires_grad_()
    check([made], 2, 9, 3, autocast=autocast)


@AUTOCAST
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_no_tokens(autocast, batch, tokens):
    made, x = learning(48, 80), torch.randn(batch, tokens, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ops.encoder(x, [made], 3).sum().backward()
    assert x.grad.shape == x.shape
    assert not any(t.grad.any() for t in made if isinstance(t, Tensor))


@needs_kernel
def test_other_dtypes_are_left_to_the_ops():
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        made, x = block(48, 80, dtype), torch.randn(2, 9, 48).to(dtype).requires_grad_()
        assert "fastvit::block" not in kernels_used(lambda made=made, x=x: ops.encoder(x, [made], 3))


@needs_kernel
@AUTOCAST
def test_a_model_trains_by_it(autocast):
    model = small_timm().train()
    fast, exact = fastvit.accelerate(copy.deepcopy(model)), copy.deepcopy(model).double()

    def gradients(model, pixels):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and pixels.dtype == torch.float32):
            loss = model(pixels).square().mean()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()

    assert "fastvit::block" in kernels_used(lambda: gradients(fast, images()))
    fast.zero_grad()
    want = gradients(exact, images().double())
    errors = [(gradients(m, images()) - want).norm() for m in (fast, model)]
    assert errors[0] <= 2 * errors[1], errors


@needs_kernel
def test_weight_gradients_under_autocast_are_not_rounded_to_bfloat16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, dy = torch.randn(2, 2, 29, 48).unbind(0)
        found = run(lambda x, b: ops.encoder(x, b, 3), x, [learning(48, 80)], dy)
    weights = {name: t for name, t in found.items() if name.split(" ")[0].endswith(("qkv_weight", "fc1_weight"))}
    assert len(weights) == 2
    for name, gradient in weights.items():
        assert (gradient != gradient.bfloat16().float()).float().mean() > 0.9, name


@needs_kernel
def test_it_compiles_in_one_graph_and_has_no_second_derivative():
    blocks, x = [learning(48, 80)], torch.randn(2, 9, 48, requires_grad=True)
    compiled = torch.compile(lambda x: ops.encoder(x, blocks, 3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ops.encoder(x, blocks, 3))
    (slope,) = torch.autograd.grad(compiled(x).sum(), x, retain_graph=True)
    torch.testing.assert_close(slope, torch.autograd.grad(ops.encoder(x, blocks, 3).sum(), x)[0])
    (slope,) = torch.autograd.grad(ops.encoder(x, blocks, 3).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="block_backward"):
        slope.sum().backward()
