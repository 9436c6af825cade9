"""linear: every backend and epilogue against fp64 mathematics, forward and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from harness import check, dtypes_of, places
from test_layer_norm import views

import fastvit
from fastvit import ops

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
    tail = 1e-9 if place.backend == "cpu" else 5e-7  # 1 + erf cancels in the left tail, in torch's own kernel too
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
    ],
)
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
