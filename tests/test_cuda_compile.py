"""The CUDA sources as nvcc compiles them, without a GPU: nothing spills, and the machine code holds what is meant."""

import re
import subprocess
from pathlib import Path

import emulated
import pytest
import torch

from fastvit.benchmarks import sass

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
# One head dim, that of most ViTs, and four of the architectures for each source; --full compiles all of them.
HEAD_DIM = 64

needs_tools = pytest.mark.skipif(
    None in (sass.nvcc(), sass.disassembler()), reason="nvcc or cuobjdump is not installed"
)


@pytest.fixture(scope="module")
def rows(request):
    full = request.config.getoption("--full")
    return sass.compile_all(head_dim=0 if full else HEAD_DIM, sample=not full)


def wrong(rows, condition):
    return [f"{row.kernel} {row.arch}: {row}" for row in rows if condition(row)]


@needs_tools
@pytest.mark.slow
def test_no_kernel_spills_on_any_architecture(rows):
    assert {row.arch for row in rows} == set(sass.ARCHITECTURES)
    assert {row.source for row in rows} == {source.stem for source in sass.SOURCES}
    assert not wrong(rows, lambda row: row.spills or row.stack or row.local)


@needs_tools
@pytest.mark.slow
def test_attention_runs_on_the_matrix_unit(rows):
    """Products by HMMA, their operands by LDSM, memory 16 bytes at a time and straight to where it is needed."""
    attention = [row for row in rows if row.source.startswith("attention")]
    assert {row.kernel.partition("<")[0] for row in attention} == {
        *("attention_kernel", "attention_streaming_kernel", "attention_backward_kernel"),
    }
    assert not wrong(attention, lambda row: not (row.hmma and row.ldsm and row.copy16 and row.store16))
    # An mma of 16 x 8 x 16 takes half of an LDSM; with 32 rows to a warp two of them share it.
    forward = [row for row in attention if re.match(r"attention_(streaming_)?kernel<\w+ 64 2", row.kernel)]
    assert forward
    assert not wrong(forward, lambda row: row.hmma < 2 * row.ldsm)


@needs_tools
@pytest.mark.slow
def test_three_blocks_of_attention_share_a_multiprocessor(rows):
    one_copy = [row for row in rows if re.match(r"attention_kernel<\w+ (32|48|64) ", row.kernel)]
    assert one_copy
    assert not wrong(one_copy, lambda row: row.registers > 168)


@needs_tools
@pytest.mark.slow
def test_rows_are_read_and_written_16_bytes_at_a_time(rows):
    """All kernels that have a version for aligned rows; what adds up partial sums reads little."""
    element_wise = [row for row in rows if not row.source.startswith("attention") and "sum" not in row.kernel]
    vectorised = [row for row in element_wise if row.load16 and row.store16]
    names = {row.kernel.partition("<")[0] for row in element_wise}
    assert {row.kernel.partition("<")[0] for row in vectorised} >= names - {"pixels_kernel", "patches_kernel"}


@pytest.mark.skipif(emulated.CXX is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cpp")), ids=lambda path: path.name)
def test_glue_compiles_for_a_gpu(source):
    """The emulator compiles it for CPU tensors, with another stream.h."""
    paths = [f"-I{path}" for path in (ROOT / "csrc", Path(torch.__path__[0]) / "include")]
    command = [emulated.CXX, *emulated.FLAGS, *paths, "-fsyntax-only", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kept_report_is_of_these_kernels(request):
    kept = sass.read_csv()
    assert not wrong(kept, lambda row: row.spills or row.stack or row.local)
    assert {row.arch for row in kept} == set(sass.ARCHITECTURES)
    assert {row.source for row in kept} == {source.stem for source in sass.SOURCES}, "run `make static`"
    if sass.nvcc() and sass.disassembler():
        now = {(row.kernel, row.arch) for row in request.getfixturevalue("rows")}
        assert now <= {(row.kernel, row.arch) for row in kept}, "run `make static`"


def included(path: Path, seen: set[Path]) -> set[Path]:
    """A file and all of ours that it includes."""
    if path in seen or not path.exists():
        return seen
    seen.add(path)
    for name in re.findall(r'#include "(.+?)"', path.read_text()):
        included(ROOT / "csrc" / name, seen)
    return seen


def test_device_code_includes_no_framework():
    for source in sass.SOURCES:
        for path in included(source, set()):
            headers = re.findall(r"#include [<\"](.+?)[>\"]", path.read_text())
            assert not [h for h in headers if h.startswith(("torch", "ATen", "c10", "pybind11"))], path.name
