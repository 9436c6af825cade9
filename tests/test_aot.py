"""Every Triton kernel x dtype x chip through the real compiler, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
OWN_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
# The calls a ViT makes: these must run on the chip's own matrix instruction, not on the one of an older chip.
HOT = ("bare", "full 768", "197 x 64", "577 x 64")


@pytest.fixture(scope="module")
def rows():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastvit.benchmarks.aot", "--json"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


def wrong(rows, condition):
    return [f"{row['kernel']} ({row['case']}) {row['dtype']} {row['chip']}: {row}" for row in rows if condition(row)]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_chip(rows):
    assert not wrong(rows, lambda row: row["error"])
    assert len({(row["dtype"], row["chip"]) for row in rows}) == 12


@pytest.mark.slow
def test_no_register_spills(rows):
    # The tiles are chosen with Triton 3.7's compiler; an older one puts a few registers of some kernels on the stack.
    allowed = 0 if version("triton") >= "3.7" else 32
    assert not wrong(rows, lambda row: row["spills"] > allowed)


@pytest.mark.slow
def test_shared_memory_fits_the_chip(rows):
    assert not wrong(rows, lambda row: row["shared"] > row["shared_limit"])


@pytest.mark.slow
def test_fp32_is_never_tf32(rows):
    assert not wrong(rows, lambda row: row["tf32"])


@pytest.mark.slow
def test_products_of_16_bit_types_run_on_the_matrix_unit(rows):
    products = [row for row in rows if row["has_dot"] and row["dtype"] != "fp32"]
    assert products
    assert not wrong(products, lambda row: not row["matrix_instruction"])
    hot = [row for row in products if row["case"] in HOT]
    assert not wrong(hot, lambda row: row["matrix_instruction"] != OWN_INSTRUCTION[row["chip"]])
