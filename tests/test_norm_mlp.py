"""norm_mlp: every backend against fp64 mathematics, forward and all gradients."""

import dataclasses
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from harness import check, check_upstreams, dtypes_of, places
from test_layer_norm import views
from test_linear import activate

import fastvit
from fastvit import ops

PLACES = places("norm_mlp")
TRITON = [place for place in PLACES if place.values[0].backend == "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6
NAMES = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale")


def sample(rows, width, hidden, out=None, *, without=()):
    out = out or width

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    values = (
        randn(rows, width) + 0.3,
        randn(width),
        randn(width),
        randn(hidden, width) / width**0.5,
        randn(hidden),
        randn(out, hidden) / hidden**0.5,
        randn(out),
        randn(out),
    )
    return {name: None if name in without else value for name, value in zip(NAMES, values, strict=True)}


@pytest.fixture
def take(monkeypatch):
    """Makes the Triton launcher take one of its ways wherever the call allows it, whatever the tuning says.

    "one kernel" keeps hidden activations on chip, "folded" normalises after the first product and "loaded" before it.
    """
    tuning = pytest.importorskip("fastvit.kernels._tuning")
    device = pytest.importorskip("fastvit.kernels._device")

    def way(name):
        monkeypatch.setattr(tuning, "FUSED_MLP_WAVES", 0)
        monkeypatch.setattr(tuning, "FUSED_MLP_WIDTH", 384 if name == "one kernel" else 0)
        monkeypatch.setattr(tuning, "FOLD_SHARE", 1e9 if name == "folded" else 0.0)
        if device.INTERPRETING:  # there an unrolled loop takes the time of all its rounds
            monkeypatch.setattr(tuning, "WEIGHT_SUM", dataclasses.replace(tuning.WEIGHT_SUM, UNROLL=1))

    return way


WAYS = ["one kernel", "folded", "loaded"]


def functions(activation="gelu", residual=True):
    def eager(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale):
        hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), fc1_weight, fc1_bias)
        y = F.linear(activate(hidden, activation), fc2_weight, fc2_bias)
        y = y if layer_scale is None else y * layer_scale
        return x + y if residual else y

    def fused(layer_scale, **tensors):
        return ops.norm_mlp(**tensors, eps=EPS, activation=activation, layer_scale=layer_scale, residual=residual)

    return fused, eager


@pytest.mark.parametrize("shape", [(1, 16, 64), (37, 48, 130), (70, 59, 33)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_parity(place, shape):
    for dtype in dtypes_of(place):
        check(place, dtype, *functions(), sample(*shape))


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("place", PLACES)
def test_options(place, activation):
    check(place, torch.float32, *functions(activation), sample(9, 32, 48, without=("layer_scale",)))
    check(place, torch.float32, *functions(activation, residual=False), sample(9, 32, 48, out=20))
    without = ("norm_weight", "norm_bias", "fc1_bias", "fc2_bias")
    check(place, torch.float32, *functions(activation), sample(9, 32, 48, without=without))


@pytest.mark.parametrize("place", PLACES)
def test_views_equal_contiguous(place):
    tensors = {k: t.float().to(place.device) for k, t in sample(12, 48, 40).items()}
    fused, _ = functions()
    with fastvit.backend(place.backend):
        want = fused(**tensors)
        for view in views(tensors["x"]):
            assert torch.allclose(fused(**{**tensors, "x": view}), want, atol=1e-5)
        assert torch.allclose(fused(**{**tensors, "x": tensors["x"].view(3, 4, 48)}).view(12, 48), want, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_empty_and_written(place, nan_filled):
    tensors = {k: t.float().to(place.device) for k, t in sample(11, 24, 40).items()}
    fused, _ = functions()
    with fastvit.backend(place.backend):
        assert not fused(**tensors).isnan().any()
        tensors["x"].requires_grad_()
        (grad,) = torch.autograd.grad(fused(**tensors).sum(), tensors["x"])
        assert not grad.isnan().any()
        empty = torch.zeros(0, 24, device=place.device, requires_grad=True)
        fused(**{**tensors, "x": empty}).sum().backward()
    assert empty.grad.shape == (0, 24)


def test_gradcheck():
    leaves = {k: t.requires_grad_() for k, t in sample(3, 6, 8).items()}
    fused, _ = functions()
    for backend in ("reference", "cpu"):
        if fastvit.is_available(backend):
            with fastvit.backend(backend):
                assert torch.autograd.gradcheck(
                    lambda *args: fused(**dict(zip(NAMES, args, strict=True))), tuple(leaves.values()), nondet_tol=0
                )


TOKENS = [1, 2, 15, 16, 17, 50, 64, 65, 127, 129, 196, 197, 198, 256, 257, 577, 1025]
# Width: hidden width. Hidden widths of 64 and its multiples go through one kernel, odd ones through two products.
WIDTHS = {64: 256, 192: 768, 384: 192, 768: 96, 1000: 52, 1023: 37, 1024: 64, 1280: 40}
GRID = list(itertools.product(TOKENS, WIDTHS, DTYPES))


@pytest.mark.grid(6)
@pytest.mark.parametrize(
    ("number", "tokens", "width", "dtype"),
    [(number, *case) for number, case in enumerate(GRID)],
    ids=[f"{tokens}-{width}-{str(dtype)[6:]}" for tokens, width, dtype in GRID],
)
@pytest.mark.parametrize("place", TRITON)
def test_grid(place, take, number, tokens, width, dtype):
    take(WAYS[number % 3])
    batch = (1, 3, 1, 3, 0)[number % 5] if tokens < 257 else 1
    without = ((), (), ("layer_scale",), ("norm_bias", "fc2_bias"), ("norm_weight", "fc1_bias"))[number % 5]
    check(place, dtype, *functions(), sample(batch * tokens, width, WIDTHS[width], without=without))


@pytest.mark.grid(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", None, "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", TRITON)
def test_every_way(place, take, way, activation, dtype):
    take(way)
    check(place, dtype, *functions(activation), sample(40, 192, 128))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", TRITON)
def test_every_way_with_parts_missing(place, take, way):
    take(way)
    check(place, torch.bfloat16, *functions(residual=False), sample(20, 384, 64, without=("layer_scale",)))
    check(place, torch.bfloat16, *functions(residual=False), sample(9, 64, 48, out=200), gradients=False)
    for without in (("norm_weight", "fc1_bias"), ("norm_bias", "fc2_bias"), NAMES[1:3]):
        check(place, torch.bfloat16, *functions(), sample(17, 64, 64, without=without))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_small_and_zero_layer_scale(place, dtype):
    """A LayerScale as DINOv2 and CaiT start it, which fp16 has no room to multiply into a weight; and none at all."""
    tensors = sample(40, 48, 96)
    tensors["layer_scale"] *= 1e-5
    tensors["layer_scale"][::3] = 0.0
    check(place, dtype, *functions(), tensors)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", TRITON)
def test_rows_far_from_zero(place, take, way, dtype):
    """mean/sd up to what the dtype represents, with all of the spread in one element, and rows of one value."""
    take(way)
    tensors = sample(24, 384, 64, without=("layer_scale", "fc2_bias"))
    x = torch.randn(24, 384, dtype=torch.float64) + torch.tensor([0.0, 10, 100, 1000, 3000, 30000] * 4)[:, None]
    x[6:12] = x[6:12].sign() * torch.tensor([1.0, 10, 100, 1000, 3000, 30000])[:, None]
    x[6:12, 7] *= 1 + 2 * torch.finfo(dtype).eps
    x[12:16] = torch.tensor([0.0, 10, 1000, 30000])[:, None]
    fused, eager = functions(residual=False)
    for rows in (slice(0, 6), slice(6, 12), slice(12, 16)):
        check(place, dtype, fused, eager, {**tensors, "x": x[rows]}, gradients=False)


@pytest.mark.parametrize("way", ["folded", "loaded"])
@pytest.mark.parametrize("place", TRITON)
def test_rows_wider_than_a_tile(place, take, way):
    """Statistics in pieces; a row that differs in one piece alone is not a row of one value."""
    take(way)
    tensors = sample(4, 9000, 16)
    tensors["x"][1:] = 1.0
    tensors["x"][1, 5] = tensors["x"][2, 8999] = 3.0
    check(place, torch.bfloat16, *functions(), tensors, gradients=False)


@pytest.mark.parametrize("place", PLACES)
def test_incoming_gradients(place, take):
    take("one kernel")
    tensors = sample(6, 64, 64)
    tensors["x"] = tensors["x"].view(2, 3, 64)
    check_upstreams(place, torch.bfloat16, functions()[0], tensors, exact=place.backend == "triton")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", TRITON)
def test_two_runs_are_bit_equal(place, take, way):
    take(way)
    tensors = {k: t.bfloat16().to(place.device).requires_grad_() for k, t in sample(130, 64, 64).items()}
    with fastvit.backend(place.backend):
        first, second = (
            (y, *torch.autograd.grad(y, [*tensors.values()], torch.ones_like(y)))
            for y in (functions()[0](**tensors) for _ in range(2))
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def drop_path_functions(rate, residual=True):
    """The op's own stochastic depth beside timm's, both from the same state of the generator."""
    timm_layers = pytest.importorskip("timm.layers")
    drop_path = timm_layers.DropPath(rate).train()

    def eager(x, **tensors):
        torch.manual_seed(3)
        branch = drop_path(functions(residual=False)[1](x, **tensors))
        return x + branch if residual else branch

    def fused(layer_scale, **tensors):
        torch.manual_seed(3)
        return ops.norm_mlp(**tensors, eps=EPS, layer_scale=layer_scale, residual=residual, drop_path=rate)

    return fused, eager


@pytest.mark.parametrize("place", PLACES)
def test_drop_path(place):
    if place.device == "cuda":
        pytest.skip("GPU: its generator draws other samples than the CPU's eager")
    tensors = sample(7 * 5, 48, 40)
    tensors["x"] = tensors["x"].view(7, 5, 48)
    for dtype in dtypes_of(place):
        check(place, dtype, *drop_path_functions(0.4), tensors)
    check(place, torch.float32, *drop_path_functions(0.4, residual=False), {**tensors, "layer_scale": None})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", TRITON)
def test_drop_path_on_every_way(place, take, way):
    take(way)
    if place.device == "cuda":
        pytest.skip("GPU: its generator draws other samples than the CPU's eager")
    tensors = sample(7 * 30, 64, 64)
    check(place, torch.bfloat16, *drop_path_functions(0.4), {**tensors, "x": tensors["x"].view(7, 30, 64)})


def test_drop_path_under_autocast():
    tensors = {k: t.float() for k, t in sample(35, 16, 32).items()}
    tensors["x"] = tensors["x"].view(7, 5, 16)
    fused, eager = drop_path_functions(0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = fused(**tensors), eager(**tensors)
    assert got.dtype == want.dtype
    assert torch.allclose(got, want, atol=0.1, rtol=0.05)
    dropped = (want == tensors["x"]).all(-1)
    assert dropped.any() and torch.equal(got[dropped], tensors["x"][dropped])


def test_drop_path_keeps_the_kernel_that_has_none(caplog):
    if not fastvit.is_available("cpu"):
        pytest.skip("the compiled extension is absent")
    tensors = {k: t.float().view(-1, 5, 16) if k == "x" else t.float() for k, t in sample(35, 16, 32).items()}
    fused, eager = drop_path_functions(0.4)
    with caplog.at_level(logging.WARNING, logger="fastvit"), torch.profiler.profile() as profile:
        y = fused(**tensors)
    assert torch.allclose(y, eager(**tensors), atol=1e-5)
    assert "fastvit_native::norm_mlp" in {event.name for event in profile.events()}
    assert not caplog.records


def test_drop_path_of_one_row_and_of_none():
    weight, row = torch.randn(4, 4), torch.randn(4)
    torch.manual_seed(0)
    got = ops.norm_mlp(row, None, None, weight, None, weight, None, drop_path=0.5)
    torch.manual_seed(0)
    branch = ops.norm_mlp(row, None, None, weight, None, weight, None, residual=False)
    assert torch.equal(got, row + branch * torch.empty(4).bernoulli_(0.5).div_(0.5))
    assert ops.norm_mlp(torch.zeros(0, 3, 4), None, None, weight, None, weight, None, drop_path=0.5).shape == (0, 3, 4)
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        ops.norm_mlp(row, None, None, weight, None, weight, None, drop_path=1.0)


@pytest.mark.parametrize("way", ["one kernel", "loaded"])
@pytest.mark.parametrize("place", [place for place in PLACES if place.values[0].backend in ("cpu", "triton")])
def test_training_keeps_little(place, take, way):
    """Backward needs the input, the statistics and the pre-activation: neither normalised rows nor activations stay."""
    take(way)
    tensors = {k: t.half().to(place.device).requires_grad_() for k, t in sample(64, 64, 128).items()}
    kept: list[int] = []
    own = {t.data_ptr() for t in tensors.values()}
    fused, _ = functions()
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(0 if t.data_ptr() in own else t.numel()) or t, lambda t: t
        ),
        fastvit.backend(place.backend),
    ):
        fused(**tensors)
    assert sum(kept) == 64 * 128 + 2 * 64


X, NW, W1, W2 = torch.randn(3, 8), torch.ones(8), torch.randn(16, 8), torch.randn(8, 16)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (
            ValueError,
            r"norm_weight must have shape \(8,\)",
            lambda: ops.norm_mlp(X, W1[0][:4], None, W1, None, W2, None),
        ),
        (
            ValueError,
            r"fc1_weight must have shape \(16, 8\)",
            lambda: ops.norm_mlp(X, NW, None, W1[:, :7], None, W2, None),
        ),
        (
            ValueError,
            r"fc2_weight must have shape \(8, 16\)",
            lambda: ops.norm_mlp(X, NW, None, W1, None, W2[:5], None),
        ),
        (TypeError, "fc2_weight must have x's dtype", lambda: ops.norm_mlp(X, NW, None, W1, None, W2.half(), None)),
        (ValueError, "eps must be", lambda: ops.norm_mlp(X, NW, None, W1, None, W2, None, -1.0)),
        (ValueError, "activation must be", lambda: ops.norm_mlp(X, NW, None, W1, None, W2, None, activation="silu")),
        (TypeError, "x must be a Tensor", lambda: ops.norm_mlp(None, NW, None, W1, None, W2, None)),
    ],
)
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
