"""layer_norm and add_layer_norm: every backend against fp64 mathematics, forward and all gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import check, check_upstreams, dtypes_of, places
from torch import Tensor

import fastvit
from fastvit import backends, ops

EPS = 1e-6
PLACES = places("layer_norm")
KERNELS = [place for place in PLACES if place.values[0].backend != "reference"]
TOKENS = [1, 2, 15, 16, 17, 50, 64, 65, 127, 129, 196, 197, 198, 256, 257, 577, 1025]
WIDTHS = [64, 192, 384, 768, 1000, 1023, 1024, 1280]
SHAPES = [(3, 192), (2, 5, 768), (1, 1), (7, 1023), (2, 3, 1664), (50, 59)]


def sample(shape: tuple[int, ...], **optional: bool) -> dict[str, Tensor | None]:
    width = shape[-1]
    tensors: dict[str, Tensor | None] = {
        "x": torch.randn(shape, dtype=torch.float64) * 2 + 0.5,
        "weight": torch.randn(width, dtype=torch.float64),
        "bias": torch.randn(width, dtype=torch.float64),
    }
    tensors["weight"][:: max(2, width // 3)] = 0.0
    if optional.get("residual"):
        tensors["residual"] = torch.randn(shape, dtype=torch.float64)
        tensors["layer_scale"] = torch.randn(width, dtype=torch.float64) if optional.get("layer_scale") else None
    return tensors


def eager(x, weight, bias, residual=None, layer_scale=None, keep=None):
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    branch = x if layer_scale is None else x * layer_scale
    z = residual + (branch if keep is None else branch * keep.to(x).div(0.7))
    return F.layer_norm(z, z.shape[-1:], weight, bias, EPS), z


def fused(x, weight, bias, residual=None, layer_scale=None, keep=None):
    if residual is None:
        return ops.layer_norm(x, weight, bias, EPS)
    if keep is not None:
        torch.manual_seed(7)
    rate = 0.0 if keep is None else 0.3
    return ops.add_layer_norm(x, residual, weight, bias, EPS, layer_scale=layer_scale, drop_path=rate)


def kept(x: Tensor, place) -> Tensor:
    """Which samples of x timm's DropPath keeps, from the generator state that `fused` starts from."""
    drop_path = pytest.importorskip("timm.layers").DropPath(0.3)
    torch.manual_seed(7)
    return drop_path(torch.ones_like(x[..., :1], device=place.device)).ne(0).cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_parity(place, shape):
    for dtype in dtypes_of(place):
        check(place, dtype, fused, eager, sample(shape))


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 192), (7, 1023)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_residual(place, shape, layer_scale):
    for dtype in dtypes_of(place):
        check(place, dtype, fused, eager, sample(shape, residual=True, layer_scale=layer_scale))


@pytest.mark.grid(16)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("place", KERNELS)
def test_tokens_and_widths(place, tokens, width):
    index = list(itertools.product(TOKENS, WIDTHS)).index((tokens, width))
    shape = ((1, 3, 0)[index % 3] if tokens < 300 else index % 2, tokens, width)
    tensors = sample(shape, residual=index % 4 > 0, layer_scale=index % 4 > 1)
    fixed = {"keep": kept(tensors["x"], place)} if index % 4 == 3 else None
    check(place, dtypes_of(place)[index % len(dtypes_of(place))], fused, eager, tensors, fixed)


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_drop_path_is_timms(place, layer_scale):
    for dtype in dtypes_of(place):
        tensors = sample((9, 5, 96), residual=True, layer_scale=layer_scale)
        check(place, dtype, fused, eager, tensors, {"keep": kept(tensors["x"], place)})


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 2, 4), (0, 3, 4), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_drop_path_of_any_rank(place, shape):
    drop_path = pytest.importorskip("timm.layers").DropPath(0.5)
    x, residual = torch.randn(2, *shape, device=place.device).requires_grad_()
    torch.manual_seed(3)
    want = residual + drop_path(x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with fastvit.backend(place.backend):
        y, z = ops.add_layer_norm(x, residual, drop_path=0.5)
    torch.testing.assert_close(z, want)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(g is not None for g in torch.autograd.grad((y * z).sum(), (x, residual), allow_unused=True))


def test_drop_path_keeps_the_kernel_that_lacks_it(monkeypatch, caplog):
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: the extension is not built")
    launcher, calls = backends.implementation("layer_norm", "cpu"), []
    forward = type(launcher).forward
    monkeypatch.setattr(type(launcher), "forward", lambda self, *args: calls.append(args[-1]) or forward(self, *args))
    monkeypatch.setattr(backends, "_reported", set())
    x = torch.randn(4, 3, 8)
    ops.add_layer_norm(x, x, drop_path=0.5)
    assert calls == [None]
    assert not caplog.records
    if fastvit.is_available("triton") and not torch.cuda.is_available():
        with fastvit.backend("triton"):
            ops.add_layer_norm(x, x, drop_path=0.5)
    assert calls == [None]
    assert "has no sample_scale" in launcher.why_not(*ops.prepare_add_layer_norm(x, x)[:-1], torch.ones(4))


def test_drop_path_compiles_in_one_graph_and_follows_autocast():
    x = torch.randn(4, 3, 8)
    for backend in ("reference", "cpu", "triton"):
        if not fastvit.is_available(backend) or (backend == "triton" and torch.cuda.is_available()):
            continue
        torch._dynamo.reset()
        with fastvit.backend(backend):
            call = torch.compile(lambda t: ops.add_layer_norm(t, t, drop_path=0.5)[1], fullgraph=True, backend="eager")
            ratio = (call(x) / x).amax((1, 2))
            assert set(ratio.round(decimals=3).tolist()) <= {1.0, 3.0}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, z = ops.add_layer_norm(x.bfloat16(), x.bfloat16(), drop_path=0.5)
            assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_without_affine(place):
    tensors = {**sample((4, 96)), "weight": None, "bias": None}
    check(place, torch.float32, fused, eager, tensors)
    check(place, torch.float32, fused, eager, {**sample((4, 96)), "bias": None})


@pytest.mark.parametrize("place", PLACES)
def test_variance_does_not_cancel(place):
    base = torch.arange(40000.0, 40004.0, dtype=torch.float64).repeat(3, 48)
    noisy = torch.randn(4, 192, dtype=torch.float64) + 1e4
    for x in (base, noisy):
        check(place, torch.float32, fused, eager, {**sample((1, 192)), "x": x}, gradients=False)


@pytest.mark.parametrize("place", PLACES)
def test_constant_rows_give_the_bias(place):
    with fastvit.backend(place.backend):
        bias = torch.randn(64, device=place.device)
        y = ops.layer_norm(torch.full((3, 64), 7.0, device=place.device), torch.ones_like(bias), bias, 1e-12)
    assert torch.equal(y, bias.expand(3, 64))


def views(tensor: Tensor) -> list[Tensor]:
    """The same numbers behind other strides: sliced rows, strided columns, an odd storage offset, expanded rows."""
    m, n = tensor.shape
    wide = tensor.new_full((m, n + 5), torch.nan)
    wide[:, 3 : n + 3] = tensor
    strided = tensor.new_full((m, 2 * n), torch.nan)
    strided[:, ::2] = tensor
    shifted = tensor.new_full((m * n + 1,), torch.nan)
    shifted[1:] = tensor.reshape(-1)
    skipped = tensor.new_full((2 * m, n), torch.nan)
    skipped[::2] = tensor
    return [wide[:, 3 : n + 3], strided[:, ::2], shifted[1:].view(m, n), skipped[::2], tensor.t().contiguous().t()]


@pytest.mark.parametrize("place", PLACES)
def test_views_equal_contiguous(place):
    x = torch.randn(6, 48, device=place.device)
    weight, bias = torch.randn(2, 48, device=place.device)
    with fastvit.backend(place.backend):
        want = ops.layer_norm(x, weight, bias)
        for view in views(x):
            assert torch.equal(ops.layer_norm(view, weight, bias), want)
        assert torch.equal(ops.layer_norm(x[:1].expand(4, -1), weight, bias), want[:1].expand(4, -1))


@pytest.mark.parametrize("place", PLACES)
def test_incoming_gradients_of_any_stride(place):
    for dtype in (torch.float32, torch.bfloat16):
        check_upstreams(place, dtype, fused, sample((3, 5, 48)))
        check_upstreams(place, dtype, fused, sample((3, 5, 48), residual=True, layer_scale=True))


@pytest.mark.parametrize("place", PLACES)
def test_one_of_the_two_results_is_enough(place):
    tensors = sample((2, 5, 48), residual=True, layer_scale=True)
    for i in (0, 1):
        used = ("x", "residual", "layer_scale", *(("weight", "bias") if i == 0 else ()))
        dtype = torch.float32
        leaves = {k: v.to(place.device, dtype).requires_grad_() for k, v in tensors.items()}
        with fastvit.backend(place.backend):
            got = torch.autograd.grad(fused(**leaves)[i].square().sum(), [leaves[k] for k in used])
        exact = {k: v.detach().double() for k, v in leaves.items()}
        exact = {k: v.requires_grad_() for k, v in exact.items()}
        want = torch.autograd.grad(eager(**exact)[i].square().sum(), [exact[k] for k in used])
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_overflow_is_eagers(place):
    largest = {torch.float16: 65504.0, torch.bfloat16: 133120.0}
    for dtype in set(largest) & set(dtypes_of(place)):
        x = torch.randn(4, 96, dtype=torch.float64).sign() * largest[dtype]
        check(place, dtype, fused, eager, {**sample((4, 96)), "x": x})


@pytest.mark.parametrize("place", PLACES)
def test_empty(place):
    x = torch.empty(0, 5, 32, device=place.device, requires_grad=True)
    weight = torch.ones(32, device=place.device, requires_grad=True)
    with fastvit.backend(place.backend):
        y = ops.layer_norm(x, weight, None)
        y.sum().backward()
    assert y.shape == (0, 5, 32)
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("place", PLACES)
def test_every_output_is_written(place, nan_filled):
    with fastvit.backend(place.backend):
        x = torch.randn(9, 100).to(place.device)
        for y in (ops.layer_norm(x, None, None), *ops.add_layer_norm(x, x)):
            assert not y.isnan().any()


def test_drop_path_keeps_the_mean_and_whole_samples():
    x, residual = torch.ones(2000, 2, 4), torch.zeros(2000, 2, 4)
    _, z = ops.add_layer_norm(x, residual, drop_path=0.25)
    kept = z[:, 0, 0] != 0
    assert torch.equal(z, torch.where(kept[:, None, None], 1 / 0.75, 0.0).expand_as(z))
    assert abs(kept.float().mean().item() - 0.75) < 0.04


def test_gradcheck():
    tensors = sample((3, 17), residual=True, layer_scale=True)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    for backend in ("reference", "cpu"):
        if fastvit.is_available(backend):
            with fastvit.backend(backend):
                assert torch.autograd.gradcheck(
                    lambda *args: fused(**dict(zip(leaves, args, strict=True))), tuple(leaves.values()), nondet_tol=0
                )


W, X = torch.ones(8), torch.randn(2, 8)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "x must be a Tensor, got list", lambda: ops.layer_norm([1.0])),
        (TypeError, "floating-point tensor, got torch.int64", lambda: ops.layer_norm(X.long())),
        (ValueError, r"x must be .* got shape \(\)", lambda: ops.layer_norm(torch.tensor(1.0))),
        (TypeError, "weight must have x's dtype", lambda: ops.layer_norm(X, W.half())),
        (ValueError, r"weight must have shape \(8,\), got \(9,\)", lambda: ops.layer_norm(X, torch.ones(9))),
        (ValueError, "eps must be a number >= 0, got -1", lambda: ops.layer_norm(X, W, W, -1.0)),
        (ValueError, "eps must be", lambda: ops.layer_norm(X, W, W, float("nan"))),
        (ValueError, "must not be empty", lambda: ops.layer_norm(torch.empty(2, 0))),
        (ValueError, r"residual must have shape \(2, 8\)", lambda: ops.add_layer_norm(X, torch.randn(3, 8))),
        (TypeError, "residual must be a Tensor", lambda: ops.add_layer_norm(X, None)),
        (ValueError, r"drop_path must be in \[0, 1\)", lambda: ops.add_layer_norm(X, X, drop_path=1.0)),
        (ValueError, "must be on x's device", lambda: ops.layer_norm(X, W.to("meta"))),
    ],
)
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
