"""What can be said of the Triton kernels without a GPU: registers, shared memory, occupancy, and the roofline's time.

    python -m fastvit.benchmarks.static [--only TEXT]      # writes benchmarks/results/static.csv and static.md

The cases are those of `launches.py` whose work is known. Nothing here is measured on a device: the time is what an H200
would need if the kernels reached the ceilings measured there, so it is a bound to judge rows by, not a row.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from . import aot
from .aot import KIB, ROOT, Row
from .launches import Launch, launches

RESULTS = ROOT / "benchmarks" / "results"
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}

# Bytes and operations a second that an H200 reached: a large device copy, read and write, and a large bf16 product.
H200_COPY = 4.3e12
H200_MATRIX = 790e12
# fp32 stays exact, so its products are multiply-adds outside the matrix unit; that figure is the data sheet's.
H200_MULTIPLY_ADD = 67e12


@dataclass(frozen=True)
class Multiprocessor:
    """What an NVIDIA multiprocessor holds, as published."""

    shared: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


# AMD's rule for kernels that mix both kinds of vector registers is not reproduced here: no occupancy is given for it.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 * KIB),
    "sm_90": Multiprocessor(228 * KIB),
    "sm_100": Multiprocessor(228 * KIB),
}


def _down(number: int, step: int) -> int:
    return number // step * step


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def resident_blocks(row: Row) -> tuple[int, str] | None:
    """Programs that live on one multiprocessor at a time, and what keeps it from more."""
    chip = MULTIPROCESSORS.get(row.chip)
    if chip is None or not row.threads:
        return None
    warps = row.threads // 32
    # A warp gets registers in units of 256, and each quarter of the multiprocessor has a quarter of them.
    warps_by_registers = _down(chip.registers // (_up(row.registers, 8) * 32), 4) if row.registers else 64
    # The driver keeps 1 KiB of each block's shared memory, which is handed out 128 bytes at a time.
    limits = {
        "threads": chip.threads // row.threads,
        "blocks": chip.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": chip.shared // _up(row.shared + KIB, 128),
    }
    what = min(limits, key=lambda name: limits[name])
    return limits[what], what


@dataclass(frozen=True)
class Prediction:
    """The roofline's time for one call on an H200, and the roof it is under."""

    flops: int
    bytes: int
    dtype: str

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    @property
    def compute_us(self) -> float:
        return 1e6 * self.flops / (H200_MULTIPLY_ADD if self.dtype == "fp32" else H200_MATRIX)

    @property
    def memory_us(self) -> float:
        return 1e6 * self.bytes / H200_COPY

    @property
    def microseconds(self) -> float:
        return max(self.compute_us, self.memory_us)

    @property
    def roof(self) -> str:
        if self.memory_us >= self.compute_us:
            return "memory"
        return "multiply-add" if self.dtype == "fp32" else "matrix"


def predict(case: Launch, dtype: str) -> Prediction:
    assert case.flops is not None and case.bytes is not None
    return Prediction(case.flops, case.bytes(ITEMSIZE[dtype]), dtype)


COLUMNS = (
    "op", "entry", "case", "dtype", "chip", "kernel", "programs", "threads", "registers", "spills", "shared_kib",
    "load", "instruction", "resident", "occupancy_pct", "limited_by", "waves", "flops", "bytes", "flops_per_byte",
    "h200_us", "roof",
)  # fmt: skip
IDENTITY = COLUMNS[:6]
Line = dict[str, str]


def lines(rows: Sequence[Row], cases: Sequence[Launch]) -> Iterator[Line]:
    """One line per kernel launch, and a last one per call, of kernel "call", with its work and its predicted time."""
    known = {(case.op, case.entry, case.label): case for case in cases}
    for (op, entry, label, dtype, chip), group in groupby(
        rows, key=lambda row: (row.op, row.entry, row.case, row.dtype, row.chip)
    ):
        identity = dict(zip(IDENTITY, (op, entry, label, dtype, chip), strict=False))
        for row in group:
            yield dict.fromkeys(COLUMNS, "") | identity | _of_kernel(row)
        yield dict.fromkeys(COLUMNS, "") | identity | _of_call(predict(known[op, entry, label], dtype), chip)


def _of_kernel(row: Row) -> Line:
    line = {
        "kernel": row.kernel,
        "programs": str(row.programs),
        "threads": str(row.threads),
        "registers": str(row.registers),
        "spills": str(row.spills),
        "shared_kib": f"{row.shared / KIB:.1f}",
        "load": row.load,
        "instruction": row.matrix_instruction,
    }
    if resident := resident_blocks(row):
        blocks, what = resident
        together = aot.CHIPS[row.chip].multiprocessors * blocks
        line |= {
            "resident": str(blocks),
            "occupancy_pct": f"{100 * blocks * row.threads / MULTIPROCESSORS[row.chip].threads:.0f}",
            "limited_by": what,
            "waves": f"{row.programs / together:.2f}" if together else "",
        }
    return line


def _of_call(work: Prediction, chip: str) -> Line:
    line = {
        "kernel": "call",
        "flops": str(work.flops),
        "bytes": str(work.bytes),
        "flops_per_byte": f"{work.intensity:.1f}",
    }
    if chip == "sm_90":
        line |= {"h200_us": f"{work.microseconds:.1f}", "roof": work.roof}
    return line


def write_csv(table: Sequence[Line], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def read_csv(path: Path = RESULTS / "static.csv") -> list[Line]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


PREFACE = """# The Triton kernels, as compiled for an H200 (sm_90)

Written by `make static`; every dtype and chip is in `static.csv`. Nothing here was measured on a device. The time is
the roofline's for a whole call: the larger of its bytes at 4.3 TB/s (a device copy) and its operations at 790 TFLOP/s
(a bf16 product), both measured on an H200, or 67 TFLOP/s for fp32 (multiply-adds, data sheet). Work is the least the
call holds: each input read once, each output written once. Load: bytes of the widest read. Resident: programs that fit
on a multiprocessor at a time, by registers, shared memory and threads. Waves: programs over what all 132 of them hold.
Compiled by Triton {triton}; another one may need other registers.
"""


def markdown(table: Sequence[Line], triton: str) -> str:
    """The 16-bit and fp32 calls on sm_90, op by op."""
    columns = {
        "case": "case", "dtype": "dtype", "kernel": "kernel", "programs": "programs", "threads": "threads",
        "registers": "regs", "shared_kib": "KiB", "load": "load", "instruction": "unit", "resident": "resident",
        "occupancy_pct": "occupancy %", "limited_by": "limited by", "waves": "waves", "flops": "GFLOP", "bytes": "MB",
        "flops_per_byte": "FLOP/B", "h200_us": "H200 µs", "roof": "roof",
    }  # fmt: skip
    text = [PREFACE.format(triton=triton)]
    shown = [line for line in table if line["chip"] == "sm_90" and line["dtype"] != "fp16"]
    titles = dict.fromkeys(f"{line['op']} {line['entry']}" for line in shown)
    for title in titles:
        text += [f"## {title}", "", _row(columns.values()), _row("---" for _ in columns)]
        group = [line for line in shown if f"{line['op']} {line['entry']}" == title]
        text += [_row(_cell(line, name) for name in columns) for line in group]
        text.append("")
    return "\n".join(text)


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(line: Line, name: str) -> str:
    if name in ("flops", "bytes") and line[name]:
        return f"{int(line[name]) / (1e9 if name == 'flops' else 1e6):.1f}"
    if line["kernel"] == "call":
        return f"**{line[name]}**" if line[name] and name in ("kernel", "h200_us", "roof") else line[name]
    return line[name].replace("_", r"\_") if name == "kernel" else line[name]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="print the calls whose 'op entry case dtype chip' contains this")
    options = parser.parse_args(arguments)
    import triton

    cases = [case for case in launches() if case.flops is not None and case.bytes is not None]
    rows = aot.compile_all(cases, full=True, only=options.only)
    if broken := [row for row in rows if row.error]:
        print(aot.table(broken), file=sys.stderr)
        return 1
    table = list(lines(rows, cases))
    if options.only:
        print(markdown(table, triton.__version__))
        return 0
    write_csv(table, RESULTS / "static.csv")
    (RESULTS / "static.md").write_text(markdown(table, triton.__version__), encoding="utf-8")
    print(f"{len(table)} lines in {RESULTS.relative_to(ROOT)}/static.csv, the H200's in static.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
