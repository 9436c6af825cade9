"""norm_mlp: every backend against fp64 mathematics, forward and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from harness import check, dtypes_of, places
from test_layer_norm import views
from test_linear import activate

import fastvit
from fastvit import ops

PLACES = places("norm_mlp")
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


def test_training_keeps_little():
    """Backward needs the input, the statistics and the pre-activation: neither normalised rows nor activations stay."""
    if not fastvit.is_available("cpu"):
        pytest.skip("the compiled extension is absent")
    tensors = {k: t.float().requires_grad_() for k, t in sample(64, 32, 128).items()}
    kept: list[int] = []
    own = {t.data_ptr() for t in tensors.values()}
    fused, _ = functions()
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(0 if t.data_ptr() in own else t.numel()) or t, lambda t: t
        ),
        fastvit.backend("cpu"),
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
