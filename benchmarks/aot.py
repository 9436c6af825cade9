"""Compile every Triton kernel ahead of time, without a GPU, and report what the compiler made of it.

    python -m fastvit.benchmarks.aot [--full] [--json] [--only TEXT]

The launchers themselves are called, on tensors without storage and under a driver that answers for another chip, so the
signatures, specialisations and meta-parameters are those of a real call. A kernel that no case launches is an error.
The process must not have TRITON_INTERPRET set. `benchmarks/static.py` makes the kept report of the same rows.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import assembly
from .launches import Launch, launches

ROOT = Path(__file__).resolve().parent.parent
KIB = 1024

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Chip:
    backend: str
    arch: int | str
    warp_size: int
    tuning: str
    matrix_instruction: str
    multiprocessors: int


# Multiprocessors are those of the A100, H200, B200 and MI300X.
CHIPS = {
    "sm_80": Chip("cuda", 80, 32, "sm_80", "mma.sync", 108),
    "sm_90": Chip("cuda", 90, 32, "sm_90", "wgmma", 132),
    "sm_100": Chip("cuda", 100, 32, "sm_90", "tcgen05", 148),
    "gfx942": Chip("hip", "gfx942", 64, "hip", "mfma", 304),
}
MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05", "mma.sync", "mfma")


@dataclass
class Row:
    """What became of one kernel launch; a launcher's call may make several, numbered by step.

    load is the widest read of device memory in bytes, TMA if the tensor copy engine does it; hazard names what copies
    may overwrite too early.
    """

    op: str
    entry: str
    case: str
    dtype: str
    chip: str
    step: int
    kernel: str
    programs: int = 0
    threads: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    shared_limit: int = 0
    has_dot: bool = False
    matrix_instruction: str = ""
    load: str = ""
    tf32: bool = False
    hazard: str = ""
    seconds: float = 0.0
    error: str = ""


def kernels() -> dict[str, Any]:
    """Every JIT function of kernels/ whose name says that it is launched, by name."""
    from triton.runtime.jit import JITFunction

    found = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for name, value in vars(importlib.import_module(f"fastvit.kernels.{path.stem}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[name] = value
    return found


class _Driver:
    """Stands in for a GPU: enough for Triton to specialise and compile a launch, not to run it."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        chip = CHIPS[name]
        self.target = GPUTarget(chip.backend, chip.arch, chip.warp_size)
        self.device = list(CHIPS).index(name)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(op: str, entry: str, case: str, dtype: str, chip: str, cache: str) -> list[Row]:
    """Rows of the kernels that one launcher call compiles, in a worker process."""
    import triton
    from triton.runtime.jit import JITFunction

    from fastvit.kernels import _candidates, _device

    triton.knobs.cache.dir = cache
    triton.runtime.driver.set_active(_Driver(chip))
    _device.chip = lambda x: CHIPS[chip].tuning
    _device.processors = lambda x: CHIPS[chip].multiprocessors
    rows: list[Row] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        row = Row(op, entry, case, dtype, chip, len(rows), self.__name__)
        row.shared_limit = _candidates.SHARED_BYTES[CHIPS[chip].tuning]
        row.programs = math.prod(grid(options) if callable(grid) else grid)
        start = time.perf_counter()
        try:
            describe(row, launch(self, *args, grid=grid, warmup=True, **options))
        except Exception as error:  # the row carries it: one failure must not hide the others
            row.error = f"{type(error).__name__}: {error}"
        row.seconds = round(time.perf_counter() - start, 2)
        rows.append(row)

    JITFunction.run = compile_only
    try:
        launch_case = next(c for c in launches() if (c.op, c.entry, c.label) == (op, entry, case))
        launcher = importlib.import_module(f"fastvit.kernels.{op}")
        getattr(launcher, entry)(*launch_case.arguments(DTYPES[dtype]))
    except Exception as error:
        rows.append(Row(op, entry, case, dtype, chip, len(rows), "launcher", error=f"{type(error).__name__}: {error}"))
    finally:
        JITFunction.run = launch
    return rows


def describe(row: Row, compiled: Any) -> None:
    row.shared = compiled.metadata.shared
    row.threads = compiled.metadata.num_warps * CHIPS[row.chip].warp_size
    row.has_dot = "tt.dot" in compiled.asm["ttir"]
    if CHIPS[row.chip].backend == "cuda":
        text = compiled.asm["ptx"]
        usage = assembly.resource_usage(compiled.asm["cubin"])
        row.registers = usage["REG"]
        row.spills = usage["STACK"] + usage["LOCAL"]
    else:
        text = compiled.asm["amdgcn"]
        # Spilled scalar registers go to lanes of vector registers, not to memory, and are not counted.
        row.registers, *spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        row.spills = max(spilled)
    row.load = assembly.widest_load(text)
    row.matrix_instruction = next((name for name in MATRIX_INSTRUCTIONS if name in text), "")
    if re.search(r"^\s*trap;", text, re.MULTILINE):
        raise RuntimeError("compiles to a trap")
    row.tf32 = "tf32" in text or "xf32" in text
    row.hazard = assembly.overwritten_operands(compiled.asm["ttgir"])


PAIRS = [(dtype, chip) for dtype in DTYPES for chip in CHIPS]
# What is compiled of every case, and what in turn, twice round: every kernel has cases enough to meet each chip.
ALWAYS = [("bf16", "sm_90")]
ROUNDS = 2
IN_TURN = [pair for pair in PAIRS if pair not in ALWAYS and (pair[0] != "fp16" or pair[1] == "sm_90")]


def plan(cases: Sequence[Launch], full: bool) -> Iterator[tuple[Launch, str, str]]:
    """What is compiled: everything, or a sample of it, smaller for the cases that are there for a path alone."""
    turns = {(case.op, case.entry): iter(ROUNDS * IN_TURN) for case in cases}
    for case in cases:
        turn = turns[case.op, case.entry]
        if full:
            pairs = PAIRS
        else:
            pairs = [*ALWAYS, *itertools.islice(turn, 1 if case.flops is None else 2)]
        yield from ((case, dtype, chip) for dtype, chip in pairs)


def compile_all(cases: Sequence[Launch], full: bool, only: str = "") -> list[Row]:
    jobs = [
        (case.op, case.entry, case.label, dtype, chip)
        for case, dtype, chip in plan(cases, full or bool(only))
        if only in f"{case.op} {case.entry} {case.label} {dtype} {chip}"
    ]
    # A fork would inherit torch's threads and locks.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        futures = [pool.submit(compile_case, *job, cache) for job in jobs]
        return [row for future in futures for row in future.result()]


def check_coverage(rows: list[Row]) -> None:
    forgotten = set(kernels()) - {row.kernel for row in rows}
    if forgotten:
        raise SystemExit(f"no case launches {', '.join(sorted(forgotten))}: add one to benchmarks/launches.py")


def table(rows: list[Row]) -> str:
    columns = f"{'dtype':<6}{'chip':<8}{'regs':>5}{'spill':>6}{'KiB':>6}{'load':>5}  {'instruction':<11}{'s':>6}"
    lines = [f"{'kernel':<36}{'case':<26}{columns}"]
    for row in rows:
        lines.append(
            f"{row.kernel:<36}{row.case:<26}{row.dtype:<6}{row.chip:<8}{row.registers:>5}{row.spills:>6}"
            f"{row.shared / KIB:>6.0f}{row.load:>5}  {row.matrix_instruction + ' tf32' * row.tf32:<11}"
            f"{row.seconds:>6.2f}" + (f"  {row.error.splitlines()[0]}" if row.error else "")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every case for every dtype and chip, not a sample of them")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    parser.add_argument("--only", default="", help="compile cases whose 'op entry case dtype chip' contains this")
    options = parser.parse_args()
    rows = compile_all(list(launches()), options.full, options.only)
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows))
    if not options.only:
        check_coverage(rows)
    if any(row.error for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
