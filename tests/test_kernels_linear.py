"""The linear launcher: what it reads and writes, tails, tiles, every epilogue and every way to a product, both ways."""

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, arena, double, each_dtype, outside, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels._tuning_matmul import MatMul, MatMulWeight

from fastvit.kernels import _device, _matmul, _tuning, _tuning_matmul, linear

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
# Tiles so small that a program of a lasting grid meets several, in pieces; and sums in parts.
TILES = {
    "descriptors": (
        (MatMul(32, 64, 32, 4, 2, DESCRIPTORS=True, PIECES=4, GROUP_M=2), 1),
        (MatMulWeight(32, 32, 64, 4, 2, DESCRIPTORS=True), 2),
    ),
    "halves": (
        (MatMul(32, 32, 16, 4, 2, DESCRIPTORS=True, PIECES=2), 1),
        (MatMulWeight(16, 32, 32, 4, 2, DESCRIPTORS=True), 1),
    ),
    "parts": ((MatMul(16, 32, 16, 4, 2, GROUP_M=2), 3), (MatMulWeight(16, 32, 32, 4, 2), 11)),
}
BY_ADDRESS = (MatMul(16, 32, 16, 4, 2), 1), (MatMulWeight(16, 32, 32, 4, 2), 2)
ROWS = [(66, 72, 136), (65, 67, 131)]  # rows, K, N: read 16 bytes at a time, or not


@pytest.fixture(params=["predicted", *TILES, "library"])
def way(request, monkeypatch):
    if request.param == "library":
        for kind in ("forward", "input", "weight"):
            for chip in _tuning_matmul.CHIPS:
                for itemsize in (2, 4):
                    monkeypatch.setitem(_tuning_matmul.LIBRARY, (kind, chip, itemsize), 0)
    elif request.param in TILES:
        for name, tile, plain in zip(("matmul", "matmul_weight"), TILES[request.param], BY_ADDRESS, strict=True):

            def choose(chip, itemsize, *sizes, tile=tile, plain=plain):
                return tile if (itemsize == 2 and sizes[-1]) or not tile[0].DESCRIPTORS else plain

            monkeypatch.setattr(_tuning, name, choose)
    return request.param


def mathematics(activation, x, weight, bias, scale, residual, factors):
    preact = F.linear(x, weight, bias)
    y = ACTIVATIONS[activation](preact)
    y = y if scale is None else y * scale
    y = y if factors is None else y * factors.repeat_interleave(len(x) // len(factors))[:, None]
    return preact, y if residual is None else residual + y


def sample(dtype, rows, depth, width, scaled=True):
    x, weight = random(rows, depth, dtype=dtype), random(width, depth, dtype=dtype, scale=depth**-0.5)
    bias, scale, residual = (random(*shape, dtype=dtype) for shape in ((width,), (width,), (rows, width)))
    factors = next(n for n in (3, 5, 1) if rows % n == 0)
    factors = arena(torch.tensor([0.0, 2.0, 1.5, 1.0, 0.5])[-factors:].to(dtype))
    return (x, weight, bias, *((scale, residual, factors) if scaled else (None, None, None)))


@pytest.mark.grid(20)
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 1, 1), *ROWS])
def test_forward(way, dtype, activation, rows, depth, width):
    x, weight, bias, scale, residual, factors = tensors = sample(dtype, rows, depth, width)
    y, preact = run(linear, x, weight, bias, scale, residual, activation, True, factors)
    exact, eager = mathematics(activation, *double(*tensors)), mathematics(activation, *outside(*tensors))
    assert_close("preact", preact, exact[0], eager[0])
    assert_close("y", y, exact[1], eager[1])


@pytest.mark.grid(6)
@each_dtype
@pytest.mark.parametrize(("rows", "depth", "width"), ROWS)
def test_bare_forward(way, dtype, rows, depth, width):
    x, weight, bias, *_ = sample(dtype, rows, depth, width)
    for tensors in ((x, weight, None), (x, weight, bias)):
        y, nothing = run(linear, *tensors, None, None, "none", False, None)
        assert nothing.numel() == 0
        assert_close("y", y, F.linear(*double(*tensors)), F.linear(*outside(*tensors)))


def gradients(activation, dy, tensors):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors[:4]]
    _, y = mathematics(activation, *leaves, *tensors[4:])
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, wanted, dy))
    return [None if leaf is None else next(grads) for leaf in leaves]


@pytest.mark.grid(24)
@each_dtype
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 1, 1), *ROWS])
def test_backward(way, dtype, activation, scaled, rows, depth, width):
    tensors = sample(dtype, rows, depth, width, scaled)
    x, weight, bias, scale, _, factors = tensors
    dy = random(rows, width, dtype=dtype)
    preact = F.linear(*outside(x, weight, bias)) if activation != "none" else dy.new_empty(0)
    got = run(linear, dy, x, weight, bias, scale, preact, activation, factors, entry="backward")
    want = gradients(activation, dy.double(), double(*tensors))
    base = gradients(activation, *outside(dy), outside(*tensors))
    for name, g, w, b in zip(("dx", "dweight", "dbias", "dlayer_scale"), got, want, base, strict=True):
        if w is None:
            assert g.numel() == 0
        else:
            assert_close(name, g, w, b, gradient=True)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_other_activations_backward(activation):
    tensors = sample(torch.float32, 33, 20, 17)
    x, weight, bias, scale, _, factors = tensors
    dy, preact = random(33, 17, dtype=torch.float32), F.linear(x, weight, bias)
    got = run(linear, dy, x, weight, bias, scale, preact, activation, factors, entry="backward")
    for g, w, b in zip(
        got, gradients(activation, dy.double(), double(*tensors)), gradients(activation, dy, tensors), strict=True
    ):
        assert_close("gradient", g, w, b, gradient=True)


@each_dtype
def test_gradients_of_small_scales_survive(dtype):
    """LayerScale starts at 1e-5: folded into an fp16 weight it would be rounded to a few subnormal numbers."""
    x, weight, bias, scale, *_ = sample(dtype, 40, 24, 16)
    scale = scale * 1e-5
    scale[3] = 0
    dy = random(40, 16, dtype=dtype, scale=64.0)
    got = run(linear, dy, x, weight, bias, scale, dy.new_empty(0), "none", None, entry="backward")
    tensors = (x, weight, bias, scale, None, None)
    want, base = gradients("none", dy.double(), double(*tensors)), gradients("none", dy, tensors)
    for g, w, b in zip(got, want, base, strict=True):
        factor = max(1.0, 1.0 / w.abs().max().item())  # the rule's slack is meant for numbers near 1
        assert_close("gradient", g.float() * factor, w * factor, b.float() * factor, gradient=True)


@pytest.mark.grid(5)
@each_dtype
@pytest.mark.parametrize(("rows", "depth", "width"), ROWS)
def test_layer_norm_on_the_way(way, dtype, rows, depth, width):
    """norm on load, folded norm, and norm or activation on load of a weight's gradient, as norm_mlp asks for them."""
    x, weight, bias, _, d, _ = sample(dtype, rows, depth, width)
    gamma, beta = random(depth, dtype=dtype), random(depth, dtype=dtype)
    mean, rstd = x.float().mean(1), (x.float().var(1, correction=0) + 1e-6).rsqrt()

    def normalised(dtype):
        return F.layer_norm(x.to(dtype), (depth,), gamma.to(dtype), beta.to(dtype), 1e-6)

    exact, eager = (F.linear(normalised(t), weight.to(t), bias.to(t)) for t in (torch.float64, dtype))
    y, _ = _matmul.linear(x, weight, bias, None, None, "none", False, norm=(mean, rstd, gamma, beta))
    assert_close("norm", y, exact, eager)
    bare = F.layer_norm(x.double(), (depth,), eps=1e-6)
    exact = F.gelu(F.linear(bare, weight.double(), bias.double()))
    eager = F.gelu(F.linear(F.layer_norm(x, (depth,), eps=1e-6), weight, bias))
    fold = (mean, rstd, weight.float().sum(1))
    assert_close("fold", _matmul.linear(x, weight, bias, None, None, "gelu", False, fold=fold)[0], exact, eager)
    dweight, dbias = _matmul.grad_weight(d, x, True, norm=(mean, rstd, gamma, beta))
    exact, eager = (d.to(t).t() @ normalised(t) for t in (torch.float64, dtype))
    assert_close("dweight", dweight, exact, eager, gradient=True)
    assert_close("dbias", dbias, d.double().sum(0), d.sum(0), gradient=True)
    exact, eager = (d.to(t).t() @ F.gelu(x.to(t)) for t in (torch.float64, dtype))
    dweight, nothing = _matmul.grad_weight(d, x, False, activation="gelu")
    assert_close("dweight", dweight, exact, eager, gradient=True)
    assert nothing.numel() == 0


@pytest.mark.grid(4)
@each_dtype
def test_gradient_of_an_activation_and_the_activation(way, dtype):
    d, weight = random(66, 72, dtype=dtype), random(72, 136, dtype=dtype, scale=72**-0.5)
    preact = random(66, 136, dtype=dtype, scale=2.0)
    dx, activated = _matmul.grad_input(d, weight, preact, "gelu", keep_activated=True)
    leaves = [preact.double().requires_grad_(), preact.clone().requires_grad_()]
    (want, exact), (base, eager) = (
        (torch.autograd.grad(F.gelu(p), p, d.to(p.dtype) @ weight.to(p.dtype))[0], F.gelu(p)) for p in leaves
    )
    assert_close("dx", dx, want, base, gradient=True)
    assert_close("activated", activated, exact, eager)


@pytest.mark.grid(4)
@each_dtype
def test_two_runs_are_bit_equal(way, dtype):
    tensors = sample(dtype, 51, 40, 72)
    x, weight, bias, scale, residual, factors = tensors
    dy, preact = random(51, 72, dtype=dtype), F.linear(x, weight, bias)
    first, second = (linear.forward(x, weight, bias, scale, residual, "gelu", True, factors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for activation in ("none", "gelu"):
        first, second = (linear.backward(dy, x, weight, bias, scale, preact, activation, factors) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.grid(12)
@each_dtype
@pytest.mark.parametrize(("rows", "depth", "width"), [(0, 8, 16), (6, 0, 16), (6, 8, 0), (0, 0, 0)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_nothing_in(way, dtype, activation, rows, depth, width):
    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    x, weight, bias, scale = zeros(rows, depth), zeros(width, depth), zeros(width) + 1, zeros(width) + 2
    factors = zeros(3 if rows else 0) + 1
    y, preact = linear.forward(x, weight, bias, scale, None, activation, True, factors)
    want = 2 * ACTIVATIONS[activation](bias)
    assert torch.equal(y, want.expand(rows, width))
    assert torch.equal(preact, bias.expand(rows, width))
    dy = zeros(rows, width) + 1
    dx, dweight, dbias, dscale = linear.backward(dy, x, weight, bias, scale, preact, activation, factors)
    assert torch.equal(dx, torch.zeros_like(x)) and torch.equal(dweight, torch.zeros_like(weight))
    assert dbias.shape == dscale.shape == (width,)
    assert rows or not (dbias.any() or dscale.any())
    if activation == "none":
        assert torch.equal(dbias, torch.full_like(bias, 2 * rows)) and torch.equal(dscale, torch.full_like(bias, rows))


def test_far_rows(way):
    """Strides of 2^31 elements, forward and back."""
    far = 1 << 31
    buffer = torch.empty(3 * far + 64, dtype=torch.float16, device=DEVICE)  # four pages of it are touched
    rows = buffer.as_strided((3, 16), (far, 1)).copy_(torch.randn(3, 16))
    wide = buffer[32:].as_strided((3, 16), (far, 1)).copy_(torch.randn(3, 16))
    weight = torch.randn(16, 16, device=DEVICE).half()
    none = rows.new_empty(0)

    def outputs(x, dy, weight):
        forward = linear.forward(x, weight, None, None, dy, "none", False, None)[0]
        return forward, *linear.backward(dy, x, weight, weight[0], None, none, "none", None)

    near = outputs(rows.contiguous(), wide.contiguous(), weight)
    assert all(torch.equal(a, b) for a, b in zip(outputs(rows, wide, weight), near, strict=True))
    many = buffer.as_strided((20, 16), (far >> 3, 1)).copy_(
        torch.randn(20, 16)
    )  # the last rows pass 2^31, no stride does
    dy = torch.randn(16, 20, device=DEVICE).half()
    near = outputs(weight, dy, many.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(outputs(weight, dy, many), near, strict=True))
    near = outputs(weight, weight[:, :3].contiguous(), wide.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(outputs(weight, weight[:, :3], wide), near, strict=True))


@each_dtype
def test_parts_of_a_sum_are_wide(way, dtype):
    """Large parts that cancel: in 16 bits each would lose what is left of them all."""
    d, x = random(33, 24, dtype=dtype, scale=8.0), random(33, 16, dtype=dtype, scale=8.0)
    left_d, left_x = random(8, 24, dtype=dtype), random(8, 16, dtype=dtype)
    d, x = torch.cat([d, left_d, -d]), torch.cat([x, left_x, x])
    dweight, dbias = _matmul.grad_weight(d, x, True)
    assert_close("dweight", dweight, d.double().t() @ x.double(), d.t() @ x, gradient=True)
    assert_close("dbias", dbias, d.double().sum(0), d.sum(0), gradient=True)


def test_gelu_keeps_its_left_tail():
    """1 + erf would leave no correct digit at -6."""
    x = torch.cat([torch.linspace(-6, -4, 997), torch.linspace(-4, 4, 1000), torch.tensor([1e4, -1e4, 0.0])])
    x = x.to(DEVICE)[:, None]
    one = torch.ones(1, 1, device=DEVICE)
    y, preact = linear.forward(x, one, None, None, None, "gelu", True, None)
    dx = linear.backward(torch.ones_like(x), x, one, None, None, preact, "gelu", None)[0]
    exact = x.double().requires_grad_()
    mathematics = exact * 0.5 * torch.special.erfc(-exact / 2**0.5)
    (slope,) = torch.autograd.grad(mathematics.sum(), exact)
    error = (y - mathematics).abs() / mathematics.abs().clamp(min=1e-30)
    assert error[:-2].max() < 3e-6
    assert y[-3] == 1e4 and y[-2] == 0 and y[-1] == 0
    assert (dx - slope).abs().max() < 5e-7


@pytest.mark.parametrize(("dtype", "huge"), [(torch.float16, 65504.0), (torch.bfloat16, 133120.0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_numbers(dtype, huge, activation):
    x = torch.tensor([[huge], [-huge]], dtype=dtype, device=DEVICE)
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    y, preact = linear.forward(x, one, None, None, None, activation, True, None)
    low = -huge if activation == "none" else 0.0
    assert y.flatten().tolist() == [x[0].item(), low]
    dx = linear.backward(torch.ones_like(y), x, one, None, None, preact, activation, None)[0]
    assert dx.flatten().tolist() == [1.0, 1.0 if activation == "none" else 0.0]


def test_copies_only_what_a_copy_makes_readable():
    rows = torch.randn(8, 32, device=DEVICE).half()
    assert _device.readable(rows) is rows
    assert _device.readable(rows[:, :30]).shape == (8, 30) and _device.readable(rows[:, :29]).stride(0) == 32
    for odd in (
        rows.flatten()[1:-31].view(7, 32),
        torch.randn(8, 33, device=DEVICE).half()[:, :32],
        rows[:1].expand(8, 32),
    ):
        copy = _device.readable(odd)
        assert torch.equal(copy, odd) and copy.stride() == (32, 1) and copy.data_ptr() % 16 == 0
    assert _device.readable(rows.float()[:, 1:]).stride(0) == 32


@pytest.mark.parametrize("chip", _tuning_matmul.CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_predictions_occupy_the_chip(chip, itemsize):
    cores = _tuning.CORES[chip]
    for rows in (1, 197, 8 * 197, 256 * 197):
        for width, depth in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (1000, 768)):
            tile, parts = _tuning.matmul(chip, itemsize, rows, width, depth, True)
            programs = -(-rows // tile.BLOCK_M) * -(-width // tile.BLOCK_N) * parts
            assert programs >= cores / 3 or rows == 1
            assert parts == 1 or depth >= parts * tile.BLOCK_K
            tile, parts = _tuning.matmul_weight(chip, itemsize, rows, width, depth, True)
            assert 1 <= parts <= max(1, rows // tile.BLOCK_M)
    whole, _ = _tuning.matmul("sm_90", 2, 256 * 197, 768, 768, True)
    assert whole.DESCRIPTORS and (whole.BLOCK_M, whole.BLOCK_N) == (128, 256)
    assert _tuning.matmul("sm_90", 2, 197, 768, 3072, True)[1] > 1
