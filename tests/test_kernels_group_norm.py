"""The group_norm launchers: what they read and write, tails, layouts, strides, sums over samples."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from arena import BAND, DEVICE, each_dtype, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import _tuning, group_norm

EPS = 1e-5
# (channels, groups), positions: below, at and beyond a tile's side; a channel a group; odd numbers of channels in tiles
SHAPES = [((4, 2), 1), ((6, 2), 16), ((7, 7), 59), ((20, 2), 17), ((3, 1), 300), ((8, 4), 128)]


def maps(channels, positions, dtype, last, samples=2):
    """Random maps with NaN before, behind and between the samples, and a start off every 16-byte boundary."""
    size = channels * positions + 5
    buffer = torch.full((2 * BAND + samples * size,), torch.nan, dtype=dtype, device=DEVICE)
    strides = (size, 1, channels) if last else (size, positions, 1)
    view = buffer[BAND + 3 :].as_strided((samples, channels, positions), strides)
    return view.copy_(torch.randn(samples, channels, positions).to(dtype))


def case(shape, positions, dtype, last=False, samples=2):
    """Maps, an incoming gradient, weight and bias; some weights are 0."""
    channels, groups = shape
    x, dy = (maps(channels, positions, dtype, last, samples) for _ in range(2))
    weight, bias = (torch.randn(channels + 2).to(DEVICE, dtype)[1:-1] for _ in range(2))
    weight[::3] = 0
    return x, dy, weight, bias, groups


def reference(x, dy, weight, bias, groups, relu, dtype):
    """(y, dx, dweight, dbias) by autograd and plain PyTorch in that dtype."""
    leaves = [v.to(dtype).contiguous().requires_grad_() for v in (x, weight, bias)]
    y = F.group_norm(leaves[0], groups, *leaves[1:], EPS)
    y = F.relu(y) if relu else y
    return y, *torch.autograd.grad(y, leaves, dy.to(dtype).contiguous())


def check(x, dy, weight, bias, groups, relu):
    y, mean, rstd = run(group_norm, x, groups, weight, bias, EPS, relu)
    gradients = run(group_norm, dy, x, mean, rstd, weight, bias, relu, entry="backward")
    exact, eager = (reference(x, dy, weight, bias, groups, relu, dtype) for dtype in (torch.float64, x.dtype))
    for name, got, e, base in zip(("y", "dx", "dweight", "dbias"), (y, *gradients), exact, eager, strict=True):
        assert_close(name, got, e, base, gradient=name != "y")
    grouped = x.double().reshape(x.shape[0], groups, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (grouped.var(2, unbiased=False) + EPS).rsqrt(), rtol=1e-4, atol=0)
    for out in (y, gradients[0]):
        assert out.stride()[1:] == (x.stride()[1:] if x.shape[2] > 1 else out.stride()[1:])
    return y, mean, rstd, *gradients


@pytest.mark.grid(14)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "positions"), SHAPES, ids=str)
@each_dtype
def test_forward_and_backward(dtype, shape, positions, last, relu):
    check(*case(shape, positions, dtype, last), relu)


@pytest.mark.parametrize("last", [False, True])
def test_groups_of_several_tiles(last, monkeypatch):
    """Several tiles along both dimensions, the last of each not full."""
    monkeypatch.setattr(_tuning, "maps", lambda channels, positions: _tuning.Maps(2, 16, num_warps=1))
    check(*case((10, 2), 37, torch.float32, last, samples=2), True)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_without_parameters(absent):
    x, dy, weight, bias, groups = case((6, 3), 21, torch.float32)
    given = {"weight": weight, "bias": bias, **dict.fromkeys(absent)}
    y, mean, rstd = run(group_norm, x, groups, given["weight"], given["bias"], EPS, True)
    got = run(group_norm, dy, x, mean, rstd, given["weight"], given["bias"], True, entry="backward")
    filled = (
        torch.ones_like(weight) if given["weight"] is None else weight,
        torch.zeros_like(bias) if given["bias"] is None else bias,
    )
    exact, eager = (reference(x, dy, *filled, groups, True, dtype) for dtype in (torch.float64, torch.float32))
    for name, g, e, base in zip(("y", "dx", "dweight", "dbias"), (y, *got), exact, eager, strict=True):
        assert_close(name, g, e, base, gradient=name != "y")


def test_far_from_zero():
    x, dy, weight, bias, groups = case((4, 2), 230, torch.float32, samples=2)
    x += torch.tensor([1e4, -3e3], device=DEVICE)[:, None, None]
    y = run(group_norm, x, groups, weight, bias, EPS, False)[0]
    exact, eager = (reference(x, dy, weight, bias, groups, False, dtype)[0] for dtype in (torch.float64, torch.float32))
    assert_close("y", y, exact, eager)


def test_the_sum_over_many_samples_is_rounded_once(monkeypatch):
    monkeypatch.setattr(_tuning, "partial_rows", lambda lines: _tuning.PartialRows(4, 16, num_warps=1))
    x, dy, weight, bias, groups = case((5, 1), 3, torch.bfloat16, samples=30)
    dy = dy.abs() + 1
    _, mean, rstd = group_norm.forward(x, groups, weight, bias, EPS, False)
    got = group_norm.backward(dy, x, mean, rstd, weight, bias, False)[1:]
    want = reference(x, dy, weight, bias, groups, False, torch.float64)[2:]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0.51 * 2**-7, atol=1e-5 * w.abs().max().item())


def test_two_runs_are_bit_equal_and_samples_know_nothing_of_each_other():
    x, dy, weight, bias, groups = case((6, 2), 40, torch.float32, samples=4)
    order = [2, 0, 3, 1]

    def call(x, dy):
        y, mean, rstd = group_norm.forward(x, groups, weight, bias, EPS, True)
        return y, mean, rstd, *group_norm.backward(dy, x, mean, rstd, weight, bias, True)

    first, second, turned = call(x, dy), call(x, dy), call(x[order], dy[order])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a[order], b) for a, b in zip(first[:4], turned[:4], strict=True))


@each_dtype
def test_no_samples_give_zero_gradients(dtype):
    x, dy, weight, bias, groups = case((6, 2), 4, dtype, samples=0)
    y, mean, rstd = group_norm.forward(x, groups, weight, bias, EPS, True)
    dx, *parameters = group_norm.backward(dy, x, mean, rstd, weight, bias, True)
    assert [tuple(t.shape) for t in (y, mean, rstd, dx)] == [(0, 6, 4), (0, 2), (0, 2), (0, 6, 4)]
    assert all(torch.equal(g, torch.zeros_like(weight)) for g in parameters)


def test_samples_more_than_32_bits_apart():
    far = 1 << 31
    buffer = torch.empty(far + 64, dtype=torch.float16, device=DEVICE)  # few pages of it are touched
    near = torch.randn(2, 4, 5).half().to(DEVICE)
    distant = buffer.as_strided((2, 4, 5), (far, 5, 1)).copy_(near)
    results = []
    for x in (near, distant):
        y, mean, rstd = group_norm.forward(x, 2, None, None, EPS, True)
        results.append((y, *group_norm.backward(x, x, mean, rstd, None, None, True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_sample_that_32_bits_do_not_count_is_refused():
    x = torch.empty(1, 1 << 16, 1 << 15, device="meta")
    assert "fewer than 2^31 numbers" in group_norm.why_not(x, 32, None, None, EPS, False)


def test_tiles_hold_a_power_of_two_of_what_there_is():
    for channels, positions in itertools.product((1, 2, 3, 32, 2048), (1, 49, 196, 3136, 100000)):
        tile = _tuning.maps(channels, positions)
        elements, most = tile.BLOCK_C * tile.BLOCK_P, 2 * channels
        assert elements <= 4096
        assert most > tile.BLOCK_C
        assert 1 <= tile.num_warps <= 8
