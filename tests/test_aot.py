"""Every Triton kernel x dtype x chip through the real compiler, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fastvit.benchmarks import aot, launches, static

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
OWN_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.fixture(scope="module")
def rows(request):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    full = request.config.getoption("--full")
    command = [sys.executable, "-m", "fastvit.benchmarks.aot", "--json", *(["--full"] if full else [])]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=7200 if full else 1800
    )
    assert run.stdout and "no case launches" not in run.stderr, run.stderr
    return json.loads(run.stdout)


def wrong(rows, condition):
    return [
        f"{row['kernel']} ({row['op']} {row['entry']} {row['case']}) {row['dtype']} {row['chip']}: {row}"
        for row in rows
        if condition(row)
    ]


def hot_rows(rows):
    """Those of the calls a ViT makes: the cases whose work is known."""
    hot = {(case.op, case.entry, case.label) for case in launches.launches() if case.flops is not None}
    return [row for row in rows if (row["op"], row["entry"], row["case"]) in hot]


def test_every_kernel_compiles_for_every_chip(rows):
    assert not wrong(rows, lambda row: row["error"])
    for op, entry in {(row["op"], row["entry"]) for row in rows}:
        seen = {(row["dtype"], row["chip"]) for row in rows if (row["op"], row["entry"]) == (op, entry)}
        assert seen >= {*aot.ALWAYS, *aot.IN_TURN}, f"{op} {entry} has too few cases for every chip to get its turn"


def test_no_register_spills(rows):
    # The tiles are chosen with Triton 3.7's compiler; an older one puts a few registers of some kernels on the stack.
    allowed = 0 if version("triton") >= "3.7" else 32
    assert not wrong(rows, lambda row: row["spills"] > allowed)


def test_shared_memory_fits_the_chip(rows):
    assert not wrong(rows, lambda row: row["shared"] > row["shared_limit"])


def test_no_copy_overwrites_what_is_multiplied(rows):
    assert not wrong(rows, lambda row: row["hazard"])


def test_fp32_is_never_tf32(rows):
    assert not wrong(rows, lambda row: row["tf32"])


def test_products_of_16_bit_types_run_on_the_matrix_unit(rows):
    products = [row for row in rows if row["has_dot"] and row["dtype"] != "fp32"]
    assert products
    assert not wrong(products, lambda row: not row["matrix_instruction"])
    hot = hot_rows(products)
    assert not wrong(hot, lambda row: row["matrix_instruction"] != OWN_INSTRUCTION[row["chip"]])


def test_memory_is_read_16_bytes_at_a_time(rows):
    hot = [row for row in hot_rows(rows) if row["dtype"] != "fp32" and row["chip"] != "gfx942"]
    assert {(row["op"], row["entry"]) for row in hot} == {(row["op"], row["entry"]) for row in rows}
    # A kernel that adds up partial sums has little to read, and a warp's 4 bytes each lie side by side.
    large = [row for row in hot if not row["kernel"].endswith("_sum_kernel")]
    assert not wrong(large, lambda row: row["load"] not in ("16", "32", "TMA"))


def test_the_kept_report_is_of_these_kernels(rows):
    kept = {tuple(line[name] for name in static.IDENTITY) for line in static.read_csv()}
    missing = {tuple(row[name] for name in static.IDENTITY) for row in hot_rows(rows)} - kept
    assert not missing, "run `make static`"
