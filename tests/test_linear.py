"""linear: every backend and epilogue against fp64 mathematics, forward and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from harness import check, check_upstreams, dtypes_of, places
from test_layer_norm import views

import fastvit
from fastvit import ops
from fastvit.ops import _contract as contract

PLACES = places("linear")
ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu"]
# rows, K, N
SHAPES = [(1, 16, 8), (5, 64, 33), (50, 59, 130), (129, 96, 65)]


def sample(m, k, n, *, bias=True, layer_scale=False, residual=False):
    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "x": randn(m, k),
        "weight": randn(n, k) / k**0.5,
        "bias": randn(n) if bias else None,
        "layer_scale": randn(n) if layer_scale else None,
        "residual": randn(m, n) if residual else None,
    }


def activate(x, activation):
    if activation is None:
        return x
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def functions(activation):
    def eager(x, weight, bias, layer_scale, residual):
        y = activate(F.linear(x, weight, bias), activation)
        y = y if layer_scale is None else y * layer_scale
        return y if residual is None else residual + y

    def fused(x, weight, bias, layer_scale, residual):
        return ops.linear(x, weight, bias, activation=activation, layer_scale=layer_scale, residual=residual)

    return fused, eager


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_parity(place, shape):
    for dtype in dtypes_of(place):
        check(place, dtype, *functions(None), sample(*shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_epilogues(place, activation):
    for dtype in dtypes_of(place):
        check(place, dtype, *functions(activation), sample(35, 48, 40, layer_scale=True, residual=True))
        check(place, dtype, *functions(activation), sample(35, 48, 40, layer_scale=True, bias=False))
        check(place, dtype, *functions(activation), sample(35, 48, 40, bias=False, residual=True))
        check(place, dtype, *functions(activation), sample(35, 48, 40))


WIDTHS = [64, 192, 384, 768, 1000, 1023, 1024, 1280]
TOKENS = [1, 2, 15, 16, 17, 50, 64, 65, 127, 129, 196, 197, 198, 256, 257, 577, 1025]
EPILOGUES = [
    {},
    {"bias": False},
    {"layer_scale": True, "residual": True},
    {"layer_scale": True, "bias": False},
    {"residual": True},
]


@pytest.mark.grid(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", WIDTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, depth, dtype):
    """Rows, batch, activation and epilogue take their turns over the grid; where products are large, fewer rows."""
    turn = WIDTHS.index(width) + 3 * WIDTHS.index(depth) + dtype.itemsize
    activation = ACTIVATIONS[turn % 4]
    tokens = TOKENS[turn % (17 if width * depth < 1 << 17 else 13 if width * depth < 1 << 19 else 6)]
    rows = tokens * ((0, 1, 3)[turn % 3] if tokens < 64 else 1)
    tensors = sample(rows, depth, width, **EPILOGUES[turn % len(EPILOGUES)])
    for place in (place.values[0] for place in PLACES if place.values[0].backend == "triton" and not place.marks):
        check(place, dtype, *functions(activation), tensors)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("place", PLACES)
def test_drop_path(place, activation, monkeypatch):
    factors = torch.tensor([0.0, 2.0, 2.0], dtype=torch.float64)

    def drawn(x, rate):
        assert rate == 0.5
        return factors.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))

    def fused(**tensors):
        return ops.linear(**tensors, activation=activation, drop_path=0.5)

    def eager(x, weight, bias, layer_scale, residual):
        y = activate(F.linear(x, weight, bias), activation)
        y = (y if layer_scale is None else y * layer_scale) * drawn(x, 0.5)
        return y if residual is None else residual + y

    monkeypatch.setattr(contract, "drop_path_scale", drawn)
    for epilogue in ({"layer_scale": True, "residual": True}, {"residual": True}, {"bias": False}):
        tensors = sample(33, 48, 40, **epilogue)
        for name in ("x", "residual"):
            tensors[name] = None if tensors[name] is None else tensors[name].view(3, 11, -1)
        for dtype in dtypes_of(place):
            check(place, dtype, fused, eager, tensors)


def test_drop_path_draws_as_timm_does():
    timm = pytest.importorskip("timm")
    x, weight, residual = torch.randn(64, 3, 8), torch.randn(8, 8), torch.randn(64, 3, 8)
    for backend in ("reference", "auto"):
        with fastvit.backend(backend):
            torch.manual_seed(7)
            got = ops.linear(x, weight, residual=residual, drop_path=0.3)
        torch.manual_seed(7)
        want = residual + timm.layers.DropPath(0.3).train()(F.linear(x, weight))
        assert torch.allclose(got, want, atol=1e-5)


def test_drop_path_needs_no_fallback(caplog):
    """The CPU's kernels have no such epilogue: the factor is applied beside them, and nobody is warned."""
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: the CPU's kernels are not built")
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with fastvit.backend("cpu"):
        assert ops.linear(x, weight, drop_path=0.5).shape == (4, 6)
    assert ops.linear(x, weight, drop_path=0.5).shape == (4, 6)
    assert not caplog.text


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("place", PLACES)
def test_incoming_gradients(place, activation):
    tensors = sample(24, 24, 16, layer_scale=True, residual=True)
    tensors |= {name: tensors[name].view(3, 8, -1) for name in ("x", "residual")}
    fused, _ = functions(activation)
    for dtype in (torch.float32, torch.bfloat16):
        check_upstreams(place, dtype, fused, tensors, exact=place.backend == "triton")


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("place", PLACES)
def test_sums_over_many_rows_are_wide(place, activation):
    """Gradients of weight, bias and LayerScale add thousands of rows: in the dtype itself they would stop growing."""
    sizes = {"bias": True, "layer_scale": True}
    for dtype in (torch.float16, torch.bfloat16):
        check(place, dtype, *functions(activation), sample(3000, 16, 8, **sizes))


@pytest.mark.parametrize("place", PLACES)
def test_views_equal_contiguous(place):
    x, weight = torch.randn(12, 48, device=place.device), torch.randn(40, 48, device=place.device)
    residual = torch.randn(12, 40, device=place.device)
    with fastvit.backend(place.backend):
        want = ops.linear(x, weight, residual=residual)
        for view in views(x):
            assert torch.allclose(ops.linear(view, weight, residual=residual), want, atol=1e-5)
        for view in views(weight):
            assert torch.allclose(ops.linear(x, view, residual=residual), want, atol=1e-5)
        for view in views(residual):
            assert torch.equal(ops.linear(x, weight, residual=view), want)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("place", PLACES)
def test_activation_far_out(place, activation):
    """Huge arguments neither overflow nor turn into NaN; the left tail keeps its sign."""
    x = torch.tensor([[-1e4, -50.0, -6.0, -5.0, -4.0, 0.0, 4.0, 50.0, 1e4]], device=place.device).t().contiguous()
    with fastvit.backend(place.backend):
        y = ops.linear(x, torch.ones(16, 1, device=place.device), activation=activation)[:, 0].cpu().double()
    want = activate(x[:, 0].cpu().double(), activation)
    assert torch.isfinite(y).all()
    tail = 5e-7 if place.backend == "reference" else 1e-9  # 1 + erf cancels in the left tail in torch's own kernel
    assert torch.allclose(y, want, rtol=2e-3, atol=tail)


@pytest.mark.parametrize("place", PLACES)
def test_leading_dimensions_and_empty(place):
    weight = torch.randn(6, 8, device=place.device, requires_grad=True)
    with fastvit.backend(place.backend):
        x = torch.randn(2, 3, 4, 8, device=place.device)
        y = ops.linear(x, weight)
        assert y.shape == (2, 3, 4, 6)
        assert torch.allclose(y.reshape(-1, 6), ops.linear(x.reshape(-1, 8), weight), atol=1e-6)
        assert ops.linear(x[0, 0, 0], weight).shape == (6,)
        empty = ops.linear(x[:0], weight, activation="gelu")
        empty.sum().backward()
    assert empty.shape == (0, 3, 4, 6)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("place", PLACES)
def test_every_output_is_written(place, nan_filled):
    with fastvit.backend(place.backend):
        x, weight = torch.randn(33, 20).to(place.device), torch.randn(17, 20).to(place.device)
        y = ops.linear(x, weight.requires_grad_(), activation="gelu")
        (grad,) = torch.autograd.grad(y.sum(), weight)
    assert not y.isnan().any()
    assert not grad.isnan().any()


def test_gradcheck():
    leaves = {k: t.requires_grad_() for k, t in sample(4, 5, 6, layer_scale=True, residual=True).items()}
    for backend in ("reference", "cpu"):
        for activation in ACTIVATIONS:
            if fastvit.is_available(backend):
                fused, _ = functions(activation)
                with fastvit.backend(backend):
                    assert torch.autograd.gradcheck(fused, tuple(leaves.values()), nondet_tol=0)


X, W = torch.randn(3, 8), torch.randn(5, 8)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "weight must be a Tensor", lambda: ops.linear(X, None)),
        (ValueError, "weight must be 2-D", lambda: ops.linear(X, W[0])),
        (ValueError, "x must end in weight's input width 8", lambda: ops.linear(X[:, :7], W)),
        (TypeError, "weight must have x's dtype torch.float32, got torch.float16", lambda: ops.linear(X, W.half())),
        (ValueError, r"bias must have shape \(5,\)", lambda: ops.linear(X, W, torch.ones(4))),
        (ValueError, r"residual must have shape \(3, 5\)", lambda: ops.linear(X, W, residual=X)),
        (ValueError, "activation must be None or one of", lambda: ops.linear(X, W, activation="relu")),
        (TypeError, "floating-point", lambda: ops.linear(X.int(), W)),
        (ValueError, r"drop_path must be in \[0, 1\), got 1", lambda: ops.linear(X, W, drop_path=1)),
        (ValueError, "needs x to have a batch dimension", lambda: ops.linear(X[0], W, drop_path=0.5)),
    ],
)
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
