"""The sample that stands for a grid: fixed, spread over every axis, and the whole grid on request."""

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from grid import sample

AXES = {
    "dtype": ["fp32", "fp16", "bf16"],
    "tokens": [1, 16, 17, 50, 64, 197, 257, 577],
    "head_dim": [16, 59, 64, 80, 128],
    "causal": [False, True],
}
CASES = {
    "-".join(map(str, values)): {(axis, str(value)) for axis, value in zip(AXES, values, strict=True)}
    for values in itertools.product(*AXES.values())
}


def test_every_value_of_every_axis_is_seen():
    seen = Counter(pair for name in sample(CASES, 8) for pair in CASES[name])
    assert set(seen) == {(axis, str(value)) for axis, values in AXES.items() for value in values}


def test_the_values_of_an_axis_come_about_equally_often():
    seen = Counter(pair for name in sample(CASES, 24) for pair in CASES[name])
    for axis, values in AXES.items():
        counts = [seen[axis, str(value)] for value in values]
        assert max(counts) - min(counts) <= 2, (axis, counts)


def test_the_sample_is_fixed_and_as_large_as_asked_for():
    assert sample(CASES, 12) == sample(dict(reversed(CASES.items())), 12)
    assert len(set(sample(CASES, 12))) == 12
    assert set(sample(CASES, 1000)) == set(CASES)


GRID = """
import pytest

@pytest.mark.grid(3)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 50, pytest.param(197, marks=pytest.mark.skip(reason="GPU: none"))])
def test_marked(dtype, tokens):
    pass

@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_plain(dtype):
    pass
"""


def collect(folder: Path, *options: str) -> list[str]:
    (folder / "test_it.py").write_text(GRID)
    command = [sys.executable, "-m", "pytest", "-p", "grid", "-c", os.devnull, "--rootdir", str(folder), "-q"]
    command += ["--collect-only", "-p", "no:cacheprovider", *options, str(folder / "test_it.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.partition("::")[2] for line in run.stdout.splitlines() if "::" in line and line[0] != " "]


def test_the_marker_thins_what_it_marks_and_full_does_not(tmp_path):
    thinned = collect(tmp_path)
    marked = [name for name in thinned if name.startswith("test_marked")]
    assert len(marked) == 3
    assert not [name for name in marked if "197" in name], "a skipped case stood for the grid"
    assert all(any(dtype in name for name in marked) for dtype in ("fp32", "fp16", "bf16"))
    assert len(thinned) == 3 + 3
    assert len(collect(tmp_path, "--full")) == 9 + 3
    assert len(collect(tmp_path, "-k", "50 and marked and fp16")) == 1
