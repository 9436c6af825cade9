"""The CUDA C++ linear layer: the library's product and our epilogue, on the emulator and a GPU."""

import pytest
import test_linear as cases
import torch
from harness import check
from test_linear import ACTIVATIONS, functions, sample

import fastvit
from fastvit import backends, ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# rows, K, N: odd widths go one element at a time, others 16 bytes
SHAPES = [(1, 16, 264), (5, 64, 33), (50, 59, 136), (9, 24, 520)]
EPILOGUES = [
    {"layer_scale": True, "residual": True},
    {"layer_scale": True, "bias": False},
    {"residual": True},
    {},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(cuda_place, dtype, activation, shape):
    for epilogue in EPILOGUES:
        check(cuda_place, dtype, *functions(activation), sample(*shape, **epilogue))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_incoming_gradients_and_samples(cuda_place, activation, monkeypatch):
    cases.test_incoming_gradients(cuda_place, activation)
    cases.test_drop_path(cuda_place, activation, monkeypatch)


def test_sample_factors_are_fused(cuda_place):
    args = list(ops.prepare_linear(torch.randn(6, 8, device=cuda_place.device), torch.ones(4, 8)))
    args[-1] = torch.ones(3, device=cuda_place.device)
    with fastvit.backend("cuda"):
        assert backends.serving("linear", *args) == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_off_16_bytes(cuda_place, dtype):
    """Rows apart and vectors that begin one element late, with a width of whole vectors."""

    def off(t):
        return torch.cat([t[..., :1], t], -1)[..., 1:]

    def through(function, late):
        return lambda **tensors: function(**{k: off(t) if k in late else t for k, t in tensors.items()})

    tensors = sample(7, 32, 40, layer_scale=True, residual=True)
    for late in (("residual",), ("layer_scale",), ("x", "weight", "bias")):
        check(cuda_place, dtype, *(through(f, late) for f in functions("gelu")), tensors)


def test_a_grid_goes_on_further_down(cuda_place):
    """More rows than the blocks of a launch begin with, in two tiles of columns."""
    check(cuda_place, torch.float32, *functions("quick_gelu"), sample(8500, 2, 132, layer_scale=True), gradients=False)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activation_far_out(cuda_place, activation):
    cases.test_activation_far_out(cuda_place, activation)
    x = torch.linspace(-12, 12, 801, dtype=torch.float64)[:, None]
    fused, eager = functions(activation)
    rest = {"weight": torch.ones(1, 1).double(), "bias": None, "layer_scale": None, "residual": None}
    check(cuda_place, torch.float32, fused, eager, {"x": x, **rest})


def test_views_empty_and_written(cuda_place, nan_filled):
    cases.test_views_equal_contiguous(cuda_place)
    cases.test_leading_dimensions_and_empty(cuda_place)
    cases.test_every_output_is_written(cuda_place, None)
    cases.test_sums_over_many_rows_are_wide(cuda_place, "gelu")


def test_refusals(cuda_place):
    native = backends.implementation("linear", "cuda").native
    x, weight = torch.randn(6, 8, device=cuda_place.device), torch.randn(4, 8, device=cuda_place.device)
    rest = (None, None, None, "none", False)
    with pytest.raises(RuntimeError, match="packed weights are for the CPU kernels"):
        native.linear(x, weight, *rest, weight)
    with pytest.raises(RuntimeError, match="6 rows are not 4 samples"):
        native.linear(x, weight, *rest, None, x.new_ones(4))
    with pytest.raises(RuntimeError, match="the CPU kernels take no sample_scale"):
        torch.ops.fastvit_native.linear(x.cpu(), weight.cpu(), *rest, None, torch.ones(3))
