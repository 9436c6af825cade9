"""What nvcc made of the CUDA kernels, without a GPU: registers, spills, and the instructions that matter.

    python -m fastvit.benchmarks.sass [--arch sm_90a ...] [--head-dim 64] [--csv FILE] [--jobs N]

Compiles every csrc/cuda/*.cu for every architecture and reads the machine code. Nothing here is measured on a device.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cuda.csv"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
# Those beside the data centre's chips: a sample of everything has each source for one of them, in turn.
IN_TURN = ("sm_86", "sm_120", "sm_89")

# Instructions of the machine code: the matrix unit, its operands from shared memory, and 16 bytes at a time.
COUNTED = {
    "hmma": r"\bHMMA\.",
    "ldsm": r"\bLDSM\.",
    "copy16": r"\bLDGSTS\.\S*128",
    "load16": r"\bLDG\.\S*128",
    "store16": r"\bSTG\.\S*128",
    "local": r"\b(?:LDL|STL)\b",
}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; the counts are of instructions in its text."""

    source: str
    kernel: str
    arch: str
    registers: int
    stack: int
    spills: int
    hmma: int
    ldsm: int
    copy16: int
    load16: int
    store16: int
    local: int


def nvcc() -> str | None:
    return shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that Triton's package carries."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.exists() else None


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Mangled names to those of the source, without namespaces and arguments."""
    names = list(names)
    text = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    plain = {}
    for name, line in zip(names, text.splitlines(), strict=True):
        line = re.sub(r"^void |fastvit::cuda::|\((?:int|bool)\)", "", line)
        line = line[: line.rindex(">(") + 1] if ">(" in line else line.partition("(")[0]
        plain[name] = line.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16").replace(", ", " ")
    return plain


def compile_one(source: Path, arch: str, head_dim: int = 0) -> list[Row]:
    """The kernels of a source; head_dim: attention for this one alone.

    Raises:
        RuntimeError: the compiler's message.
    """
    gencode = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{source.stem}.cubin"
        command = [str(nvcc()), "-std=c++17", "-O3", "-cubin", "-Xptxas=-v", "-Werror=all-warnings"]
        command += [f"-I{ROOT / 'csrc'}", f"-DFASTVIT_HEAD_DIM={head_dim}", gencode, str(source), "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {arch}:\n{done.stderr}")
        dumped = subprocess.run(
            [str(disassembler()), "-sass", cubin], check=True, capture_output=True, text=True
        ).stdout
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    report = {m[1]: (int(m[5]), int(m[2]), int(m[3]) + int(m[4])) for m in re.finditer(pattern, done.stderr, re.S)}
    texts = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dumped, re.S))
    names = demangled(report)
    rows = []
    for mangled, (registers, stack, spills) in report.items():
        counts = {name: len(re.findall(instruction, texts[mangled])) for name, instruction in COUNTED.items()}
        rows.append(Row(source.stem, names[mangled], arch, registers, stack, spills, **counts))
    return sorted(rows, key=lambda row: row.kernel)


def compile_all(
    architectures: Iterable[str] = ARCHITECTURES,
    head_dim: int = 0,
    jobs: int | None = None,
    sources: Iterable[Path] = (),
    sample: bool = False,
) -> list[Row]:
    """Every kernel of every source on every architecture; sample: on one of those IN_TURN alone."""
    wanted = [
        (source, arch, head_dim)
        for source, turn in zip(sources or SOURCES, cycle(IN_TURN), strict=False)
        for arch in architectures
        if not sample or arch == turn or arch not in IN_TURN
    ]
    with ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return [row for rows in pool.map(lambda job: compile_one(*job), wanted) for row in rows]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read_csv(path: Path = RESULTS) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(**{f.name: line[f.name] if f.type == "str" else int(line[f.name]) for f in fields(Row)})  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="e.g. sm_90a; default: all")
    parser.add_argument("--head-dim", type=int, default=0, help="attention for this head dim alone, a multiple of 16")
    parser.add_argument("--only", default="", help="sources whose name contains this text")
    parser.add_argument("--jobs", type=int, help="compilers at a time")
    parser.add_argument("--csv", type=Path, help=f"write the rows here, e.g. {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    for tool, found in (("nvcc", nvcc()), ("cuobjdump", disassembler())):
        if found is None:
            print(f"sass: there is no {tool}", file=sys.stderr)
            return 1
    sources = [source for source in SOURCES if options.only in source.stem]
    rows = compile_all(options.arch, options.head_dim, options.jobs, sources)
    if options.csv:
        write_csv(options.csv, rows)
    print(f"{'kernel':<72} {'arch':<8} regs spills hmma ldsm copy16 load16 store16")
    for row in rows:
        print(
            f"{row.kernel:<72} {row.arch:<8} {row.registers:4d} {row.spills:6d} {row.hmma:4d} {row.ldsm:4d} "
            f"{row.copy16:6d} {row.load16:6d} {row.store16:7d}"
        )
    return int(any(row.spills or row.stack for row in rows))


if __name__ == "__main__":
    sys.exit(main())
