"""group_norm: every backend against fp64 mathematics, forward and all gradients, with and without ReLU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import Place, check, check_upstreams, dtypes_of, places
from torch import Tensor

import fastvit
from fastvit import backends, native, ops

PLACES = places("group_norm")
KERNELS = [place for place in PLACES if place.values[0].backend != "reference"]
# shape and groups: a channel a group, one group, 7 groups, maps of one position, tails in every vector and tile
SHAPES = [
    ((2, 8, 3, 5), 4), ((3, 6, 7, 7), 2), ((2, 7, 4, 9), 7), ((1, 33, 14, 14), 3), ((2, 32, 1, 1), 4), ((3, 12), 3),
    ((2, 5, 257), 1), ((1, 4, 2, 3, 5), 2), ((1, 20, 12, 13), 10), ((2, 4, 61, 47), 2),
]  # fmt: skip
EPS = 1e-5


def sample(shape: tuple[int, ...], last: bool = False) -> dict[str, Tensor]:
    channels = shape[1]
    x = torch.randn(shape, dtype=torch.float64) * 2 + 0.5
    tensors = {
        "x": x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x,
        "weight": torch.randn(channels, dtype=torch.float64),
        "bias": torch.randn(channels, dtype=torch.float64),
    }
    tensors["weight"][:: max(2, channels // 3)] = 0.0
    return tensors


def eager(groups: int, relu: bool):
    """In fp64 the mathematics, in other dtypes what PyTorch makes of it."""

    def function(x, weight, bias):
        if x.dtype == torch.float64:
            grouped = x.reshape(x.shape[0], groups, -1)
            centred = grouped - grouped.sum(2, keepdim=True) / grouped.shape[2]
            deviation = (centred.square().sum(2, keepdim=True) / grouped.shape[2] + EPS).sqrt()
            y, per_channel = (centred / deviation).reshape(x.shape), (-1, *[1] * (x.dim() - 2))
            y = y if weight is None else y * weight.view(per_channel)
            y = y if bias is None else y + bias.view(per_channel)
            return y * (y > 0) if relu else y
        weight = torch.ones(x.shape[1], dtype=x.dtype) if weight is None else weight  # or it differentiates no bias
        y = F.group_norm(x, groups, weight, bias, EPS)
        return F.relu(y) if relu else y

    return function


def fused(groups: int, relu: bool):
    return lambda x, weight, bias: ops.group_norm(x, groups, weight, bias, EPS, relu=relu)


def both(groups: int, relu: bool = True):
    return fused(groups, relu), eager(groups, relu)


@pytest.mark.grid(20)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_parity(place, shape, groups, last, relu):
    for dtype in dtypes_of(place):
        check(place, dtype, *both(groups, relu), sample(shape, last))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("place", KERNELS)
def test_a_sample_in_several_parts(place, last):
    """Channels last, a part is 64 positions or more: wide maps have several, of unequal length."""
    check(place, torch.float32, *both(5), sample((1, 515, 11, 19), last))


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_without_affine(place, absent):
    for last, relu in itertools.product((False, True), repeat=2):
        tensors = {**sample((2, 6, 5, 3), last), **dict.fromkeys(absent)}
        check(place, torch.float32, *both(3, relu), tensors)


@pytest.mark.parametrize("place", PLACES)
def test_fp32_parameters_of_16_bit_maps(place):
    """As PyTorch's own on a CPU, where autocast leaves them so; everything inside is fp32 anyway."""
    for dtype, last in itertools.product((torch.bfloat16, torch.float16), (False, True)):
        tensors = sample((2, 8, 5, 7), last)
        x, weight, bias = (tensors[k].to(dtype if k == "x" else torch.float32) for k in tensors)
        leaves = [t.to(place.device).requires_grad_() for t in (x, weight, bias)]
        with fastvit.backend(place.backend):
            y = ops.group_norm(leaves[0], 4, *leaves[1:], EPS, relu=True)
            grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        want = eager(4, True)(*exact)
        assert y.dtype == dtype
        torch.testing.assert_close(y.cpu().double(), want, rtol=0.01, atol=0.01)
        for g, leaf, w in zip(grads, leaves, torch.autograd.grad(want, exact, torch.ones_like(want)), strict=True):
            assert g.dtype == leaf.dtype
            torch.testing.assert_close(g.cpu().double(), w, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("place", PLACES)
def test_variance_does_not_cancel(place):
    steps = torch.arange(40000.0, 40004.0, dtype=torch.float64).repeat(2, 4, 24).view(2, 4, 8, 12)
    noisy = torch.randn(2, 4, 8, 12, dtype=torch.float64) + 1e4
    drifting = torch.randn(2, 4, 40, 30, dtype=torch.float64) + torch.linspace(0, 1e3, 40, dtype=torch.float64)[:, None]
    for x, last in itertools.product((steps, noisy, drifting), (False, True)):
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        check(place, torch.float32, *both(2, False), {**sample((2, 4, 1)), "x": x}, gradients=False)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_constant_groups_give_the_bias(place, last):
    x = torch.tensor([7.0, -0.1]).repeat_interleave(3)[:, None, None].expand(2, 6, 29, 31).to(place.device)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight, bias = torch.randn(2, 6, device=place.device)
    with fastvit.backend(place.backend):
        y = ops.group_norm(x, 2, weight, bias, 1e-12)
    if place.backend == "reference":
        torch.testing.assert_close(y, bias[:, None, None].expand_as(y), rtol=0, atol=2.0)
    else:
        torch.testing.assert_close(y, bias[:, None, None].expand_as(y), rtol=1e-6, atol=1e-6 if last else 0.0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_nan_spoils_its_group_and_passes_the_relu(place, last):
    tensors = sample((2, 6, 5, 7), last)
    tensors["x"][1, 3, 2, 4] = torch.nan
    leaves = {k: t.to(place.device, torch.float32).requires_grad_() for k, t in tensors.items()}
    with fastvit.backend(place.backend):
        y = ops.group_norm(leaves["x"], 3, leaves["weight"], leaves["bias"], relu=True)
        grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    spoilt = torch.zeros(2, 3, dtype=torch.bool)
    spoilt[1, 1] = True
    spoilt = spoilt[:, :, None, None, None].expand(2, 3, 2, 5, 7).reshape(2, 6, 5, 7)
    assert torch.equal(y.isnan().cpu(), spoilt)
    assert torch.equal(grads[0].isnan().cpu(), spoilt)
    assert grads[1].isnan().tolist() == [False, False, True, True, False, False]
    assert not grads[2].isnan().any()


@pytest.mark.parametrize("place", PLACES)
def test_infinity_is_eagers(place):
    for last in (False, True):
        tensors = sample((2, 4, 5, 5), last)
        tensors["x"][0, 1, 2, 3] = torch.inf
        x, weight, bias = (t.float() for t in tensors.values())
        want = F.relu(F.group_norm(x, 2, weight, bias))
        with fastvit.backend(place.backend):
            y = ops.group_norm(*(t.to(place.device) if isinstance(t, Tensor) else t for t in (x, 2, weight, bias)),
                               relu=True).cpu()  # fmt: skip
        torch.testing.assert_close(y, want, equal_nan=True)


def views(x: Tensor) -> list[Tensor]:
    """The same maps behind other strides: a slice of channels, of rows, of the batch, an odd storage offset, turned."""
    b, c, h, w = x.shape
    channels = x.new_full((b, c + 3, h, w), torch.nan)
    channels[:, 2 : c + 2] = x
    rows = x.new_full((b, c, h + 2, w + 1), torch.nan)
    rows[:, :, 1 : h + 1, :w] = x
    batch = x.new_full((2 * b, c, h, w), torch.nan)
    batch[::2] = x
    shifted = x.new_full((x.numel() + 1,), torch.nan)
    shifted[1:] = x.reshape(-1)
    return [
        channels[:, 2 : c + 2],
        rows[:, :, 1 : h + 1, :w],
        batch[::2],
        shifted[1:].view(x.shape),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ]


@pytest.mark.parametrize("place", PLACES)
def test_views_equal_contiguous(place):
    x, (weight, bias) = torch.randn(3, 4, 5, 7, device=place.device), torch.randn(2, 4, device=place.device)
    dy = torch.randn_like(x)

    def results(x, dy):
        leaf = x.detach().requires_grad_()
        y = ops.group_norm(leaf, 2, weight, bias, relu=True)
        return y, torch.autograd.grad(y, leaf, dy)[0]

    with fastvit.backend(place.backend):
        want = results(x, dy)
        for view in views(x):
            assert all(torch.equal(g, w) for g, w in zip(results(view, dy), want, strict=True))
        last = x.contiguous(memory_format=torch.channels_last)
        first = results(last, dy)
        expanded = results(x[:1].expand(3, -1, -1, -1), dy)[0]
        for g, w in zip(first, want, strict=True):
            assert g.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(g, w)
        assert torch.equal(results(torch.cat([last[:1], last[2:], last[1:2], last])[::2][:1], dy[:1])[0], first[0][:1])
        assert torch.equal(expanded, want[0][:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("place", PLACES)
def test_incoming_gradients_of_any_stride(place):
    for dtype, last in ((torch.float32, False), (torch.bfloat16, True)):
        check_upstreams(place, dtype, fused(1, True), sample((2, 4, 3, 2), last))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_invariants(place, last):
    """Without an affine map groups have mean 0 and variance 1; shift and stretch change nothing; the gradient has no
    part along 1 nor along x; permuted images are permuted bits."""
    x = sample((4, 6, 9, 11), last)["x"].float().to(place.device).requires_grad_()
    with fastvit.backend(place.backend):
        y = ops.group_norm(x, 3, eps=0.0)
        moved = ops.group_norm(x.detach() * 3 - 5, 3, eps=0.0)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
        turned = ops.group_norm(x.detach()[[2, 0, 3, 1]], 3, eps=0.0)
    groups = y.detach().reshape(4, 3, -1)
    torch.testing.assert_close(groups.mean(2), torch.zeros_like(groups[..., 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(groups.square().mean(2), torch.ones_like(groups[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved, y.detach(), atol=1e-5, rtol=1e-5)
    along = dx.reshape(4, 3, -1)
    assert along.sum(2).abs().max() < 1e-5 * along.abs().sum(2).max()
    assert (along * groups).sum(2).abs().max() < 1e-5 * (along * groups).abs().sum(2).max()
    assert torch.equal(turned, y.detach()[[2, 0, 3, 1]])


@pytest.mark.parametrize("shape", [(0, 6, 4, 5), (3, 6, 0, 5), (0, 6)], ids=str)
@pytest.mark.parametrize("place", KERNELS)
def test_empty(place, shape):
    x = torch.empty(shape, device=place.device, requires_grad=True)
    weight, bias = torch.ones(2, 6, device=place.device).requires_grad_().unbind()
    with fastvit.backend(place.backend):
        y = ops.group_norm(x, 3, weight, bias, relu=True)
        dx, *parameters = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == shape
    assert all(torch.equal(g, torch.zeros(6, device=place.device)) for g in parameters)


@pytest.mark.parametrize("place", PLACES)
def test_every_output_is_written(place, nan_filled):
    with fastvit.backend(place.backend):
        for last in (False, True):
            x = sample((2, 6, 9, 5), last)["x"].float().to(place.device).requires_grad_()
            y = ops.group_norm(x, 3, relu=True)
            assert not y.isnan().any()
            assert not torch.autograd.grad(y, x, torch.randn_like(y))[0].isnan().any()


def test_gradcheck():
    for last, relu in itertools.product((False, True), repeat=2):
        leaves = {k: t.requires_grad_() for k, t in sample((2, 4, 3, 2), last).items()}
        for backend in ("reference", "cpu"):
            if fastvit.is_available(backend):
                with fastvit.backend(backend):
                    assert torch.autograd.gradcheck(fused(2, relu), tuple(leaves.values()), nondet_tol=0)


@pytest.mark.parametrize("last", [False, True])
def test_the_bits_do_not_depend_on_the_number_of_threads(last):
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: the extension is not built")
    tensors = {k: t.float() for k, t in sample((2, 64, 40, 41), last).items()}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
            with fastvit.backend("cpu"):
                y = ops.group_norm(leaves[0], 32, *leaves[1:], relu=True)
                found.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_every_instruction_set_is_right(last):
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: the extension is not built")
    built, choose = native.build_info(), torch.ops.fastvit_native.cpu_isa
    try:
        for isa in built["cpu_compiled"][: built["cpu_compiled"].index(built["cpu_detected"]) + 1]:
            choose(isa)
            for dtype in dtypes_of(Place("cpu", "cpu")):
                check(Place("cpu", "cpu"), dtype, *both(3), sample((2, 39, 9, 11), last))
    finally:
        choose("")


def test_small_maps_are_left_to_pytorch(monkeypatch):
    """auto takes what is faster; a demanded backend is taken."""
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: the extension is not built")
    launcher, calls = type(backends.implementation("group_norm", "cpu")), []
    forward = launcher.forward
    monkeypatch.setattr(launcher, "forward", lambda self, *args: calls.append(self.op) or forward(self, *args))
    small = torch.randn(1, 32, 8, 8, requires_grad=True)
    large = torch.randn(1, 32, 96, 96, requires_grad=True)
    with fastvit.backend("auto"):
        ops.group_norm(small, 32).sum().backward()
        ops.group_norm(small.detach(), 32)
        assert not calls
        ops.group_norm(large, 32).sum().backward()
        ops.group_norm(large.detach(), 32)
    assert len(calls) == 2
    with fastvit.backend("cpu"):
        ops.group_norm(small, 32)
    assert len(calls) == 3


def test_autocast_changes_nothing_on_a_cpu():
    for backend in ("reference", "cpu"):
        if fastvit.is_available(backend):
            for dtype in (torch.float32, torch.bfloat16):
                x, weight = torch.randn(2, 4, 3, 3, dtype=dtype), torch.randn(4)
                with fastvit.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
                    got, want = ops.group_norm(x, 2, weight), F.group_norm(x, 2, weight)
                assert got.dtype == want.dtype == dtype
                torch.testing.assert_close(got, want)


def test_compiles_for_any_size_and_layout_in_one_graph():
    weight, bias = torch.randn(2, 8)
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: the extension is not built")
    torch._dynamo.reset()
    call = torch.compile(lambda x: ops.group_norm(x, 4, weight, bias, relu=True), fullgraph=True, backend="eager")
    with fastvit.backend("cpu"):
        for batch, side in ((2, 5), (3, 6), (4, 7)):
            x = torch.randn(batch, 8, side, side)
            torch.testing.assert_close(call(x), F.relu(F.group_norm(x, 4, weight, bias)))
        last = x.contiguous(memory_format=torch.channels_last)
        assert call(last).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(call(last), call(x))


W, X = torch.ones(8), torch.randn(2, 8, 3, 3)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "x must be a Tensor, got list", lambda: ops.group_norm([1.0], 2)),
        (TypeError, "floating-point tensor, got torch.int64", lambda: ops.group_norm(X.long(), 2)),
        (ValueError, r"x must be .* got shape \(8,\)", lambda: ops.group_norm(W, 2)),
        (ValueError, "num_groups must be a positive integer, got 0", lambda: ops.group_norm(X, 0)),
        (ValueError, "num_groups must be a positive integer, got 2.0", lambda: ops.group_norm(X, 2.0)),
        (ValueError, "num_groups must be a positive integer, got True", lambda: ops.group_norm(X, True)),
        (ValueError, "x's 8 channels cannot be shared evenly by 3 groups", lambda: ops.group_norm(X, 3)),
        (ValueError, "x's 0 channels", lambda: ops.group_norm(X[:, :0], 1)),
        (TypeError, "weight must have x's dtype", lambda: ops.group_norm(X, 2, W.half())),
        (TypeError, "bias must have x's dtype", lambda: ops.group_norm(X.half(), 2, None, W.double())),
        (ValueError, r"weight must have shape \(8,\), got \(9,\)", lambda: ops.group_norm(X, 2, torch.ones(9))),
        (ValueError, r"bias must have shape \(8,\)", lambda: ops.group_norm(X.half(), 2, None, torch.ones(9))),
        (ValueError, "must be on x's device", lambda: ops.group_norm(X, 2, W.to("meta"))),
        (ValueError, "eps must be a number >= 0, got -1", lambda: ops.group_norm(X, 2, W, W, -1.0)),
        (ValueError, "eps must be", lambda: ops.group_norm(X, 2, eps=float("nan"))),
    ],
)  # fmt: skip
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
