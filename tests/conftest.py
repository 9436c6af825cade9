"""Set-up of every test: interpreted Triton where there is no GPU, NaN-filled allocations, and no silent skips in CI."""

import os

import interpreter
import pytest
import torch
from grid import pytest_addoption, pytest_collection_modifyitems  # noqa: F401  (hooks)

INTERPRETED = interpreter.install()

# The interpreter must be set up first.
import emulated  # noqa: E402
from fastvit.benchmarks.peers import repair_torchvision  # noqa: E402
from harness import Place  # noqa: E402

from fastvit import native  # noqa: E402

TORCHVISION_FAILURE = repair_torchvision()
REQUIRE_PARITY = os.environ.get("CI", "").lower() in ("1", "true")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a skipped test is a failure unless its reason starts with "GPU:" (there is none to run it on)."""
    outcome = yield
    report = outcome.get_result()
    if REQUIRE_PARITY and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith("GPU:"):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI, where nothing but GPU tests may be: {reason}"


ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DETECTED = "portable" if native.why_unavailable("cpu") else native.build_info()["cpu_detected"]


@pytest.fixture(params=ISAS[: ISAS.index(DETECTED) + 1])
def isa(request):
    """The CPU kernels run with each instruction set that this machine has."""
    torch.ops.fastvit_native.cpu_isa(request.param)
    yield request.param
    torch.ops.fastvit_native.cpu_isa("")


@pytest.fixture(params=["emulated", "gpu"])
def cuda_place(request, monkeypatch):
    """The CUDA C++ kernels on CPU threads' fibers (see emulated.py), and on the GPU where there is one."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("GPU: this machine has none")
        reason = native.why_unavailable("cuda")
        if reason:
            pytest.skip(reason)
        return Place("cuda", "cuda")
    reason = emulated.why_not()
    if reason:
        pytest.skip(reason)
    emulated.use(monkeypatch)
    return Place("cuda", "cpu")


@pytest.fixture
def threads():
    """torch.set_num_threads; the number of before returns after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled(monkeypatch):
    """Every torch.empty in fastvit's Python is filled with NaN, so that an output nobody wrote shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, filled)
    original = torch.Tensor.new_empty

    def new_filled(self, *args, **kwargs):
        tensor = original(self, *args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", new_filled)
