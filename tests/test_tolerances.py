"""The comparator itself: everything that must fail, fails."""

import pytest
import torch
from tolerances import compare

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def sample(request):
    torch.manual_seed(0)
    exact = torch.randn(64, 48, dtype=torch.float64)
    return exact, exact.to(request.param)


def broken(kind: str, exact: torch.Tensor, eager: torch.Tensor) -> torch.Tensor:
    bad = eager.clone()
    if kind == "nan":
        bad[3, 5] = torch.nan
    elif kind == "inf":
        bad[3, 5] = torch.inf
    elif kind == "zeros":
        bad.zero_()
    elif kind == "scaled":
        bad *= 1.5
    elif kind == "element":
        bad[3, 5] += 0.1
    elif kind == "shifted":
        bad = bad.roll(1, 0)
    elif kind == "noise":
        bad = (exact + 8 * (eager.double() - exact) + 1e-3 * torch.randn_like(exact)).to(eager.dtype)
    elif kind == "shape":
        bad = bad[:-1]
    else:
        bad = bad.to(torch.float16 if eager.dtype != torch.float16 else torch.float32)
    return bad


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", ["nan", "inf", "zeros", "scaled", "element", "shifted", "noise", "shape", "dtype"])
def test_wrong_results_fail(sample, kind, gradient):
    exact, eager = sample
    assert compare(broken(kind, exact, eager), exact, eager, gradient) is not None


@pytest.mark.parametrize("gradient", [False, True])
def test_right_results_pass(sample, gradient):
    exact, eager = sample
    assert compare(eager, exact, eager, gradient) is None
    assert compare(exact.to(eager.dtype), exact, eager, gradient) is None


def test_missing_nan_fails(sample):
    exact, eager = sample[0].clone(), sample[1]
    exact[0, 0] = torch.nan
    assert compare(eager, exact, eager) is not None


def test_empty_passes():
    empty = torch.empty(0, 4)
    assert compare(empty, empty.double(), empty) is None
