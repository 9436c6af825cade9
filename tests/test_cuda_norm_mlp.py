"""The CUDA C++ norm_mlp: LayerNorm, two products of the library's and their epilogues, on the emulator and a GPU."""

import pytest
import test_norm_mlp as cases
import torch
from harness import check
from test_norm_mlp import DTYPES, functions, sample

import fastvit
from fastvit import backends, ops

ACTIVATIONS = ["gelu", None, "gelu_tanh", "quick_gelu"]
# rows, width, hidden
SHAPES = [(1, 16, 64), (37, 48, 130), (20, 59, 33), (9, 640, 72)]
WITHOUT = [(), ("layer_scale",), ("norm_bias", "fc2_bias"), ("norm_weight", "fc1_bias")]


@pytest.mark.parametrize("number", range(4), ids=lambda n: f"{SHAPES[n]}")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(cuda_place, dtype, activation, number):
    without = WITHOUT[(number + ACTIVATIONS.index(activation)) % 4]
    check(cuda_place, dtype, *functions(activation), sample(*SHAPES[number], without=without))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_residual(cuda_place, dtype):
    check(cuda_place, dtype, *functions(residual=False), sample(9, 32, 48, out=20))
    check(cuda_place, dtype, *functions(residual=False), sample(9, 32, 48, out=24, without=("layer_scale",)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_and_zero_layer_scale(cuda_place, dtype):
    cases.test_small_and_zero_layer_scale(cuda_place, dtype)


def test_drop_path(cuda_place):
    cases.test_drop_path(cuda_place)
    x, weight = (torch.randn(6, 8, device=cuda_place.device) for _ in range(2))
    args = ops.prepare_norm_mlp(x, None, None, weight, None, weight.t(), None)
    with fastvit.backend("cuda"):
        assert backends.serving("norm_mlp", *args[:-1], x.new_ones(3)) == "cuda"


def test_views_empty_written_and_incoming_gradients(cuda_place, nan_filled):
    cases.test_views_equal_contiguous(cuda_place)
    cases.test_empty_and_written(cuda_place, None)
    cases.test_incoming_gradients(cuda_place, lambda way: None)


def test_training_keeps_little(cuda_place):
    cases.test_training_keeps_little(cuda_place, lambda way: None, "loaded")
    rows, weight = torch.randn(3, 8, device=cuda_place.device), torch.randn(8, 8, device=cuda_place.device)
    launcher = backends.implementation("norm_mlp", "cuda")
    kept = launcher.forward(rows, None, None, weight, None, weight, None, None, 1e-6, "gelu", True, False, None)
    assert [t.numel() for t in kept] == [24, 0, 0, 0]
