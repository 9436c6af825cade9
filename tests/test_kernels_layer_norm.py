"""The layer_norm launcher: what it reads and writes, tails, widths, row counts."""

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import layer_norm


@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(5, 1), (130, 3), (3, 768), (2, 1023), (2, 1664), (2, 9001)])
def test_layer_norm(dtype, rows, width):
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    scale, weight, bias = (random(width, dtype=dtype) for _ in range(3))
    y, z, mean, rstd = run(layer_norm, x, residual, scale, weight, bias, 1e-6, None)
    assert_close("z", z, *(r + s * t for r, s, t in (double(residual, scale, x), (residual, scale, x))))
    exact, eager = (F.layer_norm(*t[:1], (width,), *t[1:], 1e-6) for t in (double(z, weight, bias), (z, weight, bias)))
    assert_close("y", y, exact, eager)
    centred = z.double() - z.double().mean(1, keepdim=True)
    torch.testing.assert_close(mean.double(), z.double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (centred.square().mean(1) + 1e-6).rsqrt(), rtol=1e-4, atol=0)
    bare, empty, _, _ = run(layer_norm, x, None, None, None, None, 1e-6, None)
    assert empty.numel() == 0
    assert_close("bare", bare, *(F.layer_norm(t, (width,), eps=1e-6) for t in (x.double(), x)))


def test_layer_norm_of_very_many_and_of_very_wide_rows():
    # On a GPU more programs than the second and third grid axis hold.
    x = torch.randn(5_000_003 if DEVICE == "cuda" else 5_003, 16, device=DEVICE)
    y = run(layer_norm, x, None, None, None, None, 1e-6, None)[0]
    assert_close("rows", y, *(F.layer_norm(t, (16,), eps=1e-6) for t in (x.double(), x)))
    x = 1e4 + torch.randn(2, 65_537, device=DEVICE)
    y = run(layer_norm, x, None, None, None, None, 1e-6, None)[0]
    assert_close("width", y, *(F.layer_norm(t, (65_537,), eps=1e-6) for t in (x.double(), x)))
