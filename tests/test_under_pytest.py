"""`pytest benchmarks`: the suite's cases under pytest-benchmark; a provider that fails its check fails its test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1")


def pytest_benchmarks(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", *QUICK, *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run(
        command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=240, check=False
    )


def test_cases_are_timed_in_groups(tmp_path: Path) -> None:
    target = tmp_path / "times.json"
    done = pytest_benchmarks("-k", "layer_norm-1x50x768 and forward-cpu and float32", f"--benchmark-json={target}")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(target.read_text())
    assert {one["extra_info"]["provider"] for one in told["benchmarks"]} == {"eager", "fastvit"}
    assert {one["group"] for one in told["benchmarks"]} == {"layer_norm 1x50x768 float32 forward"}
    assert all(one["extra_info"]["bytes"] == (2 * 50 * 768 + 2 * 768) * 4 for one in told["benchmarks"])
    assert told["machine_info"]["fastvit"]["torch"]


def test_cases_of_a_gpu_are_deselected_with_the_reason() -> None:
    import torch

    if torch.cuda.is_available():
        return
    done = pytest_benchmarks("--collect-only", "-k", "cuda")
    assert "cases deselected: torch finds no GPU" in done.stdout
    assert "cuda-fastvit-triton" not in done.stdout


@pytest.mark.parametrize("suite", ["op", "model"])
def test_a_wrong_result_is_no_speed(tmp_path: Path, suite: str) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import fastvit\n"
        "right = fastvit.ops.layer_norm\n"
        "fastvit.ops.layer_norm = lambda *args, **options: right(*args, **options) * 1.001\n"
        "fast = fastvit.accelerate\n"
        "def accelerate(model):\n"
        "    model.head.register_forward_hook(lambda module, inputs, output: output * 1.001)\n"
        "    return fast(model)\n"
        "fastvit.accelerate = accelerate\n"
    )
    chosen = {"op": "layer_norm-1x50x768 and float32-forward-cpu", "model": "vit_base and 1x3x224 and forward-cpu"}
    done = pytest_benchmarks("-p", "wrong", "-k", chosen[suite], PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "FAILED: " in done.stdout and "above" in done.stdout
