"""The layer_norm launchers: what they read and write, tails, widths, row counts, strides."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, DTYPES, double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import _device, _tuning, layer_norm

EPS = 1e-6
WIDTHS = [1, 16, 59, 192, 384, 768, 1000, 1023, 1024, 1280, 1664, 2500, 4096, 9001]
ROWS = [1, 3, 17, 198]
KINDS = ["plain", "residual", "scaled", "dropped", "scaled and dropped"]
PARAMETERS = "weight", "bias", "layer_scale", "sample_scale"


def case(rows, width, kind, dtype, samples=1):
    """Launcher arguments by name; some weights and some samples' factors are 0."""
    t = {name: random(rows, width, dtype=dtype) for name in ("x", "dy")}
    t |= {name: random(width, dtype=dtype) for name in ("weight", "bias")}
    t["weight"][::3] = 0
    t |= dict.fromkeys(("residual", "dz", "layer_scale", "sample_scale"))
    if kind != "plain":
        t |= {name: random(rows, width, dtype=dtype) for name in ("residual", "dz")}
    if "scaled" in kind:
        t["layer_scale"] = random(width, dtype=dtype)
    if "dropped" in kind:
        t["sample_scale"] = (torch.rand(samples, device=DEVICE) < 0.7).to(dtype) / 0.7
    return t


def branch(x, t, dtype):
    """x times its factors, as eager PyTorch makes it in that dtype."""
    if t["sample_scale"] is not None:
        x = x * t["sample_scale"].to(dtype).repeat_interleave(x.shape[0] // t["sample_scale"].shape[0])[:, None]
    return x if t["layer_scale"] is None else x * t["layer_scale"].to(dtype)


def check_forward(t):
    arguments = (t["x"], t["residual"], t["layer_scale"], t["weight"], t["bias"], EPS, t["sample_scale"])
    y, z, mean, rstd = run(layer_norm, *arguments)
    if t["residual"] is None:
        assert z.numel() == 0
        z = t["x"]
    else:
        assert_close("z", z, *(t["residual"].to(d) + branch(t["x"].to(d), t, d) for d in (torch.float64, z.dtype)))
    width = z.shape[1:]
    exact, eager = (F.layer_norm(v[0], width, *v[1:], EPS) for v in (double(z, t["weight"], t["bias"]),
                                                                    (z, t["weight"], t["bias"])))  # fmt: skip
    assert_close("y", y, exact, eager)
    centred = z.double() - z.double().mean(1, keepdim=True)
    torch.testing.assert_close(mean.double(), z.double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (centred.square().mean(1) + EPS).rsqrt(), rtol=1e-4, atol=0)
    return z, mean, rstd


def gradients(t, z, dtype):
    """(d, dx, dlayer_scale, dweight, dbias) by autograd and plain PyTorch in that dtype."""
    leaves = [v.to(dtype).requires_grad_() for v in (z, t["weight"], t["bias"])]
    y = F.layer_norm(leaves[0], z.shape[1:], *leaves[1:], EPS)
    d, dweight, dbias = torch.autograd.grad(y, leaves, t["dy"].to(dtype))
    d = d if t["dz"] is None else d + t["dz"].to(dtype)
    dropped = branch(d, {**t, "layer_scale": None}, dtype)
    return d, branch(d, t, dtype), (dropped * t["x"].to(dtype)).sum(0), dweight, dbias


def check_backward(t, z, mean, rstd):
    scaled = t["layer_scale"] is not None
    options = (t["x"] if scaled else None, t["layer_scale"], t["sample_scale"])
    got = run(layer_norm, t["dy"], t["dz"], z, mean, rstd, t["weight"], *options, entry="backward")
    present = (True, scaled or t["sample_scale"] is not None, scaled, True, True)
    want = zip(gradients(t, z, torch.float64), gradients(t, z, z.dtype), strict=True)
    names = ("dresidual", "dx", "dlayer_scale", "dweight", "dbias")
    for name, g, there, (exact, eager) in zip(names, got, present, want, strict=True):
        if there:
            assert_close(name, g, exact, eager, gradient=True)
        else:
            assert g.numel() == 0
    return got


def large_tile(monkeypatch):
    """The tile of many rows that are read 16 bytes at a time, for a few that start anywhere."""
    monkeypatch.setattr(_tuning, "FEW_NORM_ROWS", 0)
    monkeypatch.setattr(_device, "aligned", lambda *_: True)


@pytest.mark.grid(30)
@pytest.mark.parametrize(("rows", "width"), list(itertools.product(ROWS, WIDTHS)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@each_dtype
def test_forward_and_backward(dtype, kind, rows, width, monkeypatch):
    if rows > 17:
        large_tile(monkeypatch)
        rows = rows if width < 2000 else 21
    t = case(rows, width, kind, dtype, samples=rows // 3 if rows % 3 == 0 else 1)
    check_backward(t, *check_forward(t))


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_without_parameters(missing):
    t = case(5, 48, "residual", torch.float32)
    arguments = {**t, **dict.fromkeys(missing)}
    y, z, mean, rstd = run(layer_norm, *(arguments[k] for k in ("x", "residual", "layer_scale", "weight", "bias")),
                           EPS, None)  # fmt: skip
    parameters = arguments["weight"], arguments["bias"]
    assert_close("y", y, *(F.layer_norm(v[0], (48,), *v[1:], EPS) for v in (double(z, *parameters), (z, *parameters))))
    if arguments["weight"] is None:
        ones = {**t, "weight": torch.ones_like(t["weight"])}
        got = run(layer_norm, t["dy"], t["dz"], z, mean, rstd, None, None, None, None, entry="backward")
        for g, exact, eager in zip(got, *(gradients(ones, z, d) for d in (torch.float64, torch.float32)), strict=True):
            assert g.numel() == 0 or not assert_close("gradient", g, exact, eager, gradient=True)


def test_very_many_and_very_wide_rows(monkeypatch):
    large_tile(monkeypatch)
    # On a GPU more programs than the second and third grid axis hold.
    t = case(5_000_003 if DEVICE == "cuda" else 65_537, 3, "plain", torch.float32)
    check_backward(t, *check_forward(t))
    t = case(1, 65_537, "plain", torch.float32)
    t["x"] += 1e4
    check_backward(t, *check_forward(t))


@each_dtype
def test_rows_that_do_not_vary(dtype):
    """Constant rows, rows far from 0, rows at the end of the dtype's range: finite, and as eager has them."""
    far = torch.arange(40000.0, 40004.0).repeat(50)
    largest = 60000.0 if dtype == torch.float16 else 133120.0
    rows = [torch.full((200,), 7.0), far, 1e4 + torch.randn(200), torch.randn(200).sign() * largest, torch.zeros(200)]
    t = case(5, 200, "plain", dtype)
    t["x"] = torch.stack(rows).to(DEVICE, dtype)
    check_backward(t, *check_forward(t))


def test_identities_of_the_gradient():
    """y does not change when its row is shifted or stretched, so the gradient has no part along 1 nor along the row."""
    t = case(33, 192, "plain", torch.float32)
    z, mean, rstd = check_forward(t)
    d = check_backward(t, z, mean, rstd)[0].double()
    centred = z.double() - z.double().mean(1, keepdim=True)
    assert d.sum(1).abs().max() < 1e-6 * d.abs().sum(1).max()
    assert (d * centred).sum(1).abs().max() < 1e-5 * (d * centred).abs().sum(1).max()


def call(t, order=slice(None)):
    """Everything that forward and backward return, for rows in another order."""
    x, residual, dy, dz = (t[k][order] for k in ("x", "residual", "dy", "dz"))
    y, z, mean, rstd = layer_norm.forward(x, residual, t["layer_scale"], t["weight"], t["bias"], EPS, None)
    return y, z, mean, rstd, *layer_norm.backward(dy, dz, z, mean, rstd, t["weight"], x, t["layer_scale"], None)


@each_dtype
def test_two_runs_are_bit_equal_and_rows_know_nothing_of_each_other(dtype):
    t = case(21, 300, "scaled", dtype)
    order = torch.randperm(21, device=DEVICE)
    first, second, turned = call(t), call(t), call(t, order)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for i in range(6):
        assert torch.equal(first[i][order], turned[i])


def test_a_gradient_of_any_number_of_programs(monkeypatch):
    t = case(21, 300, "scaled", torch.float32)
    z, mean, rstd = check_forward(t)
    want = check_backward(t, z, mean, rstd)
    for processors in (1, 3, 200):
        monkeypatch.setattr(_device, "processors", lambda x, n=processors: n)
        got = check_backward(t, z, mean, rstd)
        assert all(torch.equal(a, b) for a, b in zip(want[:2], got[:2], strict=True))


@each_dtype
def test_long_sums_that_only_grow(dtype, monkeypatch):
    """Parameters' gradients are rounded once; eager PyTorch on a CPU sums them in 16 bits and is no yardstick."""
    monkeypatch.setattr(_device, "processors", lambda x: 1)
    monkeypatch.setattr(_tuning, "NORM_BACKWARD_WARPS", {2: 1, 4: 1})
    large_tile(monkeypatch)
    t = case(401, 300, "scaled", dtype)
    t["dy"] = (1 + torch.rand(401, 300, device=DEVICE)).to(dtype)
    t["dz"] = t["dy"].clone()
    t["residual"] = (torch.linspace(-9, 9, 300, device=DEVICE) + torch.randn(401, 1, device=DEVICE)).to(dtype)
    t["x"] = torch.rand(401, 300, device=DEVICE).to(dtype)
    z, mean, rstd = check_forward(t)
    got, want = check_backward(t, z, mean, rstd)[2:], gradients(t, z, torch.float64)[2:]
    for g, w in zip(got, want, strict=True):
        once = 0.51 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        torch.testing.assert_close(g.double(), w, rtol=once, atol=1e-5 * w.abs().max().item())


def test_one_row_of_nan_stays_alone():
    t = case(9, 100, "scaled", torch.float32)
    t["x"][4] = torch.nan
    y, z, mean, rstd, d, dx, *_ = call(t)
    for name, tensor in {"y": y, "z": z, "mean": mean, "rstd": rstd, "d": d, "dx": dx}.items():
        rows = tensor.isnan().view(9, -1)
        assert rows[4].all(), name
        assert rows.sum() == rows[4].numel(), name


@each_dtype
def test_no_rows_give_zero_gradients(dtype):
    t = case(0, 8, "scaled", dtype)
    y, z, mean, rstd, d, dx, *parameters = call(t)
    assert [tuple(v.shape) for v in (y, z, mean, rstd, d, dx)] == [(0, 8), (0, 8), (0,), (0,), (0, 8), (0, 8)]
    for gradient in parameters:
        assert torch.equal(gradient, torch.zeros(8, dtype=dtype, device=DEVICE))


def test_strides_beyond_32_bits():
    far, tensors = 1 << 31, 5
    # Few pages of it are touched, so the rest costs address space and no memory.
    buffer = torch.empty(2 * far + 1024, dtype=torch.float16, device=DEVICE)
    weight, layer_scale = torch.randn(2, 16, device=DEVICE).half()
    t = {"weight": weight, "bias": None, "layer_scale": layer_scale}
    near = torch.randn(tensors, 3, 16).half().to(DEVICE)
    distant = [buffer[64 * i :].as_strided((3, 16), (far, 1)).copy_(near[i]) for i in range(tensors)]
    names = ("x", "residual", "dy", "dz", "z")
    results = []
    for rows in (near, distant):
        t |= dict(zip(names, rows, strict=True))
        y, _, mean, rstd, *_ = call(t)
        grads = layer_norm.backward(t["dy"], t["dz"], t["z"], mean, rstd, t["weight"], t["x"], t["layer_scale"], None)
        results.append((y, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cpu", reason="GPU: four gigabytes of work")
def test_more_elements_than_32_bits_count():
    rows = (1 << 31) // 768 + 5
    x = torch.randn(rows, 768, device=DEVICE, dtype=torch.float16)
    y, _, mean, rstd = layer_norm.forward(x, None, None, None, None, EPS, None)
    d = layer_norm.backward(x, None, x, mean, rstd, None, None, None, None)[0]
    z = x[rows - 64 :].clone()
    again, _, mean, rstd = layer_norm.forward(z, None, None, None, None, EPS, None)
    torch.testing.assert_close(y[rows - 64 :], again)
    torch.testing.assert_close(d[rows - 64 :], layer_norm.backward(z, None, z, mean, rstd, *[None] * 4)[0])


def test_tiles_hold_whole_rows_and_warps_share_them_evenly():
    for width, itemsize, scaled in itertools.product((1, 16, 59, 192, 768, 1024, 1025, 4096), (2, 4), (False, True)):
        tile, programs = _tuning.norm_backward(itemsize, width, scaled)
        assert width <= tile.BLOCK_D
        assert tile.BLOCK_M % tile.SUMS == 0
        assert programs >= 1
    assert {dtype.itemsize for dtype in DTYPES} == {2, 4}
