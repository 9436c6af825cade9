"""The CUDA C++ layer_norm: forward and every gradient against fp64 mathematics, on the emulator and on a GPU."""

import contextlib
import itertools

import emulated
import pytest
import torch
import torch.nn.functional as F
from arena import DTYPES, arena, double, each_dtype
from harness import check, check_upstreams
from test_layer_norm import eager, fused, kept, sample, views
from tolerances import assert_close

import fastvit
from fastvit import backends, ops

EPS = 1e-6
WIDTHS = [1, 59, 192, 513, 640, 768, 1023, 1024, 1028, 1152, 2048, 3001]
ROWS = [1, 3, 5, 40]
KINDS = ["plain", "residual", "scaled", "dropped", "scaled and dropped"]
NAMES = "dresidual", "dx", "dlayer_scale", "dweight", "dbias"


def launcher(place):
    return emulated.launchers().layer_norm if place.device == "cpu" else backends.implementation("layer_norm", "cuda")


def case(place, rows, width, kind, dtype, samples=1, aligned=False):
    """Launcher arguments by name, amid NaN unless aligned; some weights and some samples' factors are 0."""

    def random(*shape):
        made = torch.randn(shape).to(dtype)
        return made.to(place.device) if aligned else arena(made, place.device)

    t = {name: random(rows, width) for name in ("x", "dy")}
    t |= {name: random(width) for name in ("weight", "bias")}
    t["weight"][::3] = 0
    t |= dict.fromkeys(("residual", "dz", "layer_scale", "sample_scale"))
    if kind != "plain":
        t |= {name: random(rows, width) for name in ("residual", "dz")}
    if "scaled" in kind:
        t["layer_scale"] = random(width)
    if "dropped" in kind:
        factors = torch.arange(samples) % 3 / 1.5
        t["sample_scale"] = arena(factors.to(dtype), place.device)
    return t


def branch(x, t, dtype):
    """x times its factors, as eager PyTorch makes it in that dtype."""
    x = x if t["layer_scale"] is None else x * t["layer_scale"].to(dtype)
    if t["sample_scale"] is None:
        return x
    return x * t["sample_scale"].to(dtype).repeat_interleave(x.shape[0] // t["sample_scale"].shape[0])[:, None]


def forward(place, t):
    names = ("x", "residual", "layer_scale", "weight", "bias")
    return launcher(place).forward(*(t[k] for k in names), EPS, t["sample_scale"])


def check_forward(place, t):
    y, z, mean, rstd = forward(place, t)
    if t["residual"] is None:
        assert z.numel() == 0
        z = t["x"]
    else:
        assert_close("z", z, *(t["residual"].to(d) + branch(t["x"].to(d), t, d) for d in (torch.float64, z.dtype)))
    parameters = (t["weight"], t["bias"])
    wide, same = (F.layer_norm(v[0], z.shape[1:], *v[1:], EPS) for v in (double(z, *parameters), (z, *parameters)))
    assert_close("y", y, wide, same)
    centred = z.double() - z.double().mean(1, keepdim=True)
    torch.testing.assert_close(mean.double(), z.double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (centred.square().mean(1) + EPS).rsqrt(), rtol=1e-4, atol=0)
    return z, mean, rstd


def gradients(t, z, dtype):
    """(d, dx, dlayer_scale, dweight, dbias) by autograd and plain PyTorch in that dtype."""
    leaves = [None if v is None else v.to(dtype).requires_grad_() for v in (z, t["weight"], t["bias"])]
    weight = torch.ones_like(z[0], dtype=dtype).requires_grad_() if leaves[1] is None else leaves[1]
    bias = torch.zeros_like(z[0], dtype=dtype).requires_grad_() if leaves[2] is None else leaves[2]
    y = F.layer_norm(leaves[0], z.shape[1:], weight, bias, EPS)
    d, dweight, dbias = torch.autograd.grad(y, (leaves[0], weight, bias), t["dy"].to(dtype))
    d = d if t["dz"] is None else d + t["dz"].to(dtype)
    dropped = branch(d, {**t, "layer_scale": None}, dtype)
    return d, branch(d, t, dtype), (dropped * t["x"].to(dtype)).sum(0), dweight, dbias


def backward(place, t, z, mean, rstd):
    x = t["x"] if t["layer_scale"] is not None else None
    scales = (t["layer_scale"], t["sample_scale"])
    return launcher(place).backward(t["dy"], t["dz"], z, mean, rstd, t["weight"], x, *scales)


def check_backward(place, t, z, mean, rstd):
    got = backward(place, t, z, mean, rstd)
    scaled = t["layer_scale"] is not None
    present = (True, scaled or t["sample_scale"] is not None, scaled, True, True)
    want = zip(gradients(t, z, torch.float64), gradients(t, z, z.dtype), strict=True)
    for name, g, there, (exact, same) in zip(NAMES, got, present, want, strict=True):
        if there:
            assert_close(name, g, exact, same, gradient=True)
        else:
            assert g.numel() == 0, name
    return got


@pytest.mark.grid(96)
@pytest.mark.parametrize("aligned", [False, True], ids=["anywhere", "aligned"])
@pytest.mark.parametrize(("rows", "width"), list(itertools.product(ROWS, WIDTHS)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@each_dtype
def test_forward_and_backward(cuda_place, dtype, kind, rows, width, aligned):
    samples = rows // 5 if rows % 5 == 0 else rows
    t = case(cuda_place, rows, width, kind, dtype, samples, aligned)
    check_backward(cuda_place, t, *check_forward(cuda_place, t))


@pytest.mark.parametrize("width", [192, 512, 640, 768, 1000, 1024, 1280, 1536, 2048])
@each_dtype
def test_each_kernel_that_reads_16_bytes_at_a_time(cuda_place, dtype, width):
    """More rows than the warps of one processor, so that each warp goes on to another row."""
    few = emulated.device(1) if cuda_place.device == "cpu" else contextlib.nullcontext()
    with few:
        for kind in ("plain", "scaled and dropped"):
            t = case(cuda_place, 40, width, kind, dtype, samples=8, aligned=True)
            check_backward(cuda_place, t, *check_forward(cuda_place, t))


@pytest.mark.parametrize("shape", [(2, 5, 192), (7, 1023), (2, 3, 1152)], ids=str)
@pytest.mark.parametrize("layer_scale", [False, True])
@each_dtype
def test_through_the_op(cuda_place, dtype, shape, layer_scale):
    check(cuda_place, dtype, fused, eager, sample(shape))
    tensors = sample(shape, residual=True, layer_scale=layer_scale)
    check(cuda_place, dtype, fused, eager, tensors)
    check(cuda_place, dtype, fused, eager, tensors, {"keep": kept(tensors["x"], cuda_place)})


@pytest.mark.parametrize("width", [96, 1600])
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_without_parameters(cuda_place, missing, width):
    for kind, aligned in itertools.product(("plain", "scaled"), (False, True)):
        t = case(cuda_place, 5, width, kind, torch.float32, aligned=aligned) | dict.fromkeys(missing)
        check_backward(cuda_place, t, *check_forward(cuda_place, t))
    check(cuda_place, torch.float32, fused, eager, sample((5, width)) | dict.fromkeys(missing))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("width", [2560, 3001])
def test_sums_that_shared_memory_does_not_hold(cuda_place, width, aligned):
    if cuda_place.device != "cpu":
        width *= 16
    for kind in ("residual", "scaled and dropped"):
        t = case(cuda_place, 9, width, kind, torch.float32, samples=3, aligned=aligned)
        z, mean, rstd = check_forward(cuda_place, t)
        want = check_backward(cuda_place, t, z, mean, rstd)
        if cuda_place.device == "cpu":
            with emulated.device(shared=8 * 1024):
                got = check_backward(cuda_place, t, z, mean, rstd)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("width", [48, 1152])
def test_views_equal_contiguous(cuda_place, width):
    x, residual = torch.randn(2, 6, width, device=cuda_place.device)
    weight, bias = torch.randn(2, width, device=cuda_place.device)
    with fastvit.backend(cuda_place.backend):
        want = ops.add_layer_norm(x, residual, weight, bias)
        for view, other in zip(views(x), views(residual), strict=True):
            got = ops.add_layer_norm(view, other, weight, bias)
            # Where lanes hold other columns the sums have another order.
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
            assert torch.equal(got[1], want[1])
        same = ops.add_layer_norm(x[:1].expand(4, -1), residual[:4], weight, bias)
        assert torch.equal(same[1], residual[:4] + x[:1])


@pytest.mark.parametrize("width", [48, 1152])
def test_incoming_gradients_of_any_stride(cuda_place, width):
    for dtype in (torch.float32, torch.bfloat16):
        check_upstreams(cuda_place, dtype, fused, sample((3, 5, width)), exact=False)
        tensors = sample((3, 5, width), residual=True, layer_scale=True)
        check_upstreams(cuda_place, dtype, fused, tensors, exact=False)


def test_strides_beyond_32_bits(cuda_place):
    far = 1 << 31
    # Few pages of it are touched, so the rest costs address space and no memory.
    buffer = torch.empty(2 * far + 4096, dtype=torch.float16, device=cuda_place.device)
    t = case(cuda_place, 3, 16, "scaled", torch.float16)
    z, mean, rstd = check_forward(cuda_place, t)
    want = backward(cuda_place, t, z, mean, rstd)
    names = ("x", "residual", "dy", "dz")
    distant = {k: buffer[64 * i :].as_strided((3, 16), (far, 1)).copy_(t[k]) for i, k in enumerate(names)}
    again, mean, rstd = check_forward(cuda_place, {**t, **distant})
    assert torch.equal(again, z)
    z = buffer[1024:].as_strided((3, 16), (far, 1)).copy_(z)
    got = backward(cuda_place, {**t, **distant}, z, mean, rstd)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("width", [300, 768, 1600])
@each_dtype
def test_bits_repeat_and_rows_know_nothing_of_each_other(cuda_place, dtype, width):
    t = case(cuda_place, 21, width, "scaled", dtype, aligned=True)
    order = torch.randperm(21).to(cuda_place.device)
    turned = t | {k: t[k][order] for k in ("x", "residual", "dy", "dz")}

    def call(t):
        y, z, mean, rstd = forward(cuda_place, t)
        return y, z, mean, rstd, *backward(cuda_place, t, z, mean, rstd)

    first, second, third = call(t), call(t), call(turned)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for i in range(6):
        assert torch.equal(first[i][order], third[i])


@pytest.mark.parametrize("width", [300, 1600])
@each_dtype
def test_long_sums_that_only_grow(cuda_place, dtype, width):
    """Parameters' gradients are rounded once; eager PyTorch on a CPU sums them in 16 bits and is no yardstick."""
    t = case(cuda_place, 203, width, "scaled", dtype, aligned=True)
    t["dy"] = (1 + torch.rand(203, width)).to(cuda_place.device, dtype)
    t["dz"] = t["dy"].clone()
    t["x"] = torch.rand(203, width).to(cuda_place.device, dtype)
    with emulated.device(1) if cuda_place.device == "cpu" else contextlib.nullcontext():
        z, mean, rstd = check_forward(cuda_place, t)
        got = backward(cuda_place, t, z, mean, rstd)[2:]
    for g, w in zip(got, gradients(t, z, torch.float64)[2:], strict=True):
        once = 0.51 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        torch.testing.assert_close(g.double(), w, rtol=once, atol=1e-5 * w.abs().max().item())


@each_dtype
def test_rows_that_do_not_vary(cuda_place, dtype):
    """Constant rows, rows far from 0, rows at the end of the dtype's range: finite, and as eager has them."""
    far = torch.arange(40000.0, 40004.0).repeat(50)
    largest = 60000.0 if dtype == torch.float16 else 133120.0
    rows = [torch.full((200,), 7.0), far, 1e4 + torch.randn(200), torch.randn(200).sign() * largest, torch.zeros(200)]
    t = case(cuda_place, 5, 200, "plain", dtype)
    t["x"] = torch.stack(rows).to(cuda_place.device, dtype)
    check_backward(cuda_place, t, *check_forward(cuda_place, t))
    wide = case(cuda_place, 1, 6001, "plain", torch.float32)
    wide["x"] += 1e4
    check_backward(cuda_place, wide, *check_forward(cuda_place, wide))


def test_one_row_of_nan_stays_alone(cuda_place):
    t = case(cuda_place, 9, 100, "scaled", torch.float32)
    t["x"][4] = torch.nan
    y, z, mean, rstd = forward(cuda_place, t)
    d, dx, *_ = backward(cuda_place, t, z, mean, rstd)
    for name, tensor in {"y": y, "z": z, "mean": mean, "rstd": rstd, "d": d, "dx": dx}.items():
        rows = tensor.isnan().view(9, -1)
        assert rows[4].all(), name
        assert rows.sum() == rows[4].numel(), name


@pytest.mark.parametrize("width", [100, 768, 1600])
def test_every_output_is_written(cuda_place, width):
    t = case(cuda_place, 5, width, "scaled and dropped", torch.float32)
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
    try:
        y, z, mean, rstd = forward(cuda_place, t)
        gradients = backward(cuda_place, t, z, mean, rstd)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(v.isnan().any() for v in (y, z, mean, rstd, *gradients))


@pytest.mark.parametrize("width", [8, 1600])
@each_dtype
def test_no_rows_give_zero_gradients(cuda_place, dtype, width):
    for kind, samples in (("scaled", 1), ("scaled and dropped", 0), ("scaled and dropped", 3)):
        t = case(cuda_place, 0, width, kind, dtype, samples)
        y, z, mean, rstd = forward(cuda_place, t)
        d, dx, *parameters = backward(cuda_place, t, z, mean, rstd)
        assert {tuple(v.shape) for v in (y, z, d, dx)} == {(0, width)}
        assert {tuple(v.shape) for v in (mean, rstd)} == {(0,)}
        for gradient in parameters:
            assert torch.equal(gradient, torch.zeros(width, dtype=dtype, device=cuda_place.device))


def test_what_the_kernels_refuse(cuda_place):
    t = case(cuda_place, 6, 8, "scaled and dropped", torch.float32, samples=4)
    with pytest.raises(RuntimeError, match="6 rows are not 4 samples"):
        forward(cuda_place, t)
    with pytest.raises(RuntimeError, match="need a residual"):
        forward(cuda_place, {**t, "residual": None})
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        forward(cuda_place, {k: v if v is None else v.double() for k, v in t.items()})
    assert launcher(cuda_place).why_not(t["x"].double(), *[None] * 4, EPS, None)
    assert {*launcher(cuda_place).dtypes} == {*DTYPES}
