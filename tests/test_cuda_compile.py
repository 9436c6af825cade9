"""The CUDA sources without a GPU: they compile for every architecture without spilling, and the device code, run on CPU
threads, gives LayerNorm."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")
CXX = shutil.which(os.environ.get("CXX", "c++"))
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_cxx = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("code", ["sm_80", "sm_90a", "sm_100a", "compute_80"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_kernels_compile_without_spilling(source, code, tmp_path):
    target = f"-gencode=arch={code.replace('sm', 'compute')},code={code}"
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings", f"-I{CSRC}", target]
    done = subprocess.run([*command, "-c", source, "-o", tmp_path / "out.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if code.startswith("compute"):  # PTX is compiled by the driver: there is no report
        return
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 18, "float32, float16, bfloat16 x vector, scalar x 512, 1024, wider"
    assert not any(spills), done.stderr
    assert max(registers) <= 96, "a fifth of an SM's threads and more must stay resident"


def test_device_code_includes_no_framework():
    for path in [*SOURCES, *(CSRC / "cuda").glob("*.cuh"), *(CSRC / "cuda").glob("*.h")]:
        headers = re.findall(r"#include [<\"](.+?)[>\"]", path.read_text())
        assert not [h for h in headers if h.startswith(("torch", "ATen", "c10", "pybind11"))], path.name


@pytest.fixture(scope="module")
def on_threads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_threads")
    for header in ("cuda_fp16.h", "cuda_bf16.h"):  # the real ones need the toolkit
        (folder / header).write_text("")
    library = folder / "layer_norm.so"
    source = ROOT / "tests/cuda_layer_norm_on_threads.cpp"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", f"-I{folder}", f"-I{CSRC}"]
    subprocess.run([CXX, *flags, source, "-o", library], check=True)
    return ctypes.CDLL(str(library)).layer_norm


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


@needs_cxx
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "vec", "blocks"),
    [
        (5, 1, 1, 2),
        (3, 59, 1, 1),
        (9, 192, 4, 2),
        (2, 512, 4, 1),
        (5, 768, 4, 1),
        (2, 1023, 1, 1),
        (2, 1024, 4, 1),
        (3, 1028, 4, 2),
        (2, 3001, 1, 1),
    ],
)
def test_layer_norm_on_threads(on_threads, rows, width, vec, blocks, affine, residual):
    def in_arena(*shape):
        """Values between guards of NaN, rows apart."""
        arena = torch.full((shape[0], shape[1] + 8), torch.nan)
        view = arena[:, 4:-4] if vec == 4 else arena[:, 3:-5]
        return view.copy_(torch.randn(shape) * 2 + 30)

    x = in_arena(rows, width)
    other, scale = (in_arena(rows, width), torch.randn(width)) if residual else (None, None)
    weight, bias = (torch.randn(width), torch.randn(width)) if affine else (None, None)
    y, z = torch.full((2, rows + 2, width), torch.nan).unbind(0)
    mean, rstd = torch.full((2, rows), torch.nan).unbind(0)
    on_threads(
        pointer(x), ctypes.c_int64(x.stride(0)), pointer(other), ctypes.c_int64(other.stride(0) if residual else 0),
        pointer(scale), pointer(weight), pointer(bias), pointer(y[1:]), pointer(z[1:]), pointer(mean), pointer(rstd),
        ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_float(1e-6), ctypes.c_int(blocks), ctypes.c_int(vec),
    )  # fmt: skip
    summed = other.double() + scale.double() * x.double() if residual else x.double()
    if residual:
        torch.testing.assert_close(z[1:-1], summed.float(), rtol=3e-7, atol=1e-5)
        summed = z[1:-1].double()
    exact = F.layer_norm(summed, (width,), *(t.double() if affine else None for t in (weight, bias)), eps=1e-6)
    torch.testing.assert_close(y[1:-1].double(), exact, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(mean.double(), summed.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), 1 / (summed.var(1, correction=0) + 1e-6).sqrt(), rtol=1e-5, atol=1e-6)
    for output in (y, z):
        assert output[[0, -1]].isnan().all(), "written outside the output"
