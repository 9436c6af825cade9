"""Plant known faults in the kernels, one at a time, and see whether the op's own tests notice.

    python tests/mutants.py [OP ...] [--list] [--jobs N] [--csv FILE]

A fault is a patch, `tests/mutants/<op>/<what-is-wrong>.patch`, applied in a copy of the tree. It is killed if a test of
that op fails over it; one that cannot be imported or run at all proves nothing and counts against the tests.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as tree
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests" / "mutants"
SHARE = 0.95
OUTCOMES = ("killed", "survived", "does not apply", "broken", "tests fail without it")
# What a kernel that cannot run raises: such a patch is no plausible fault.
BREAKS = re.compile(
    r"(\w*\.)*(SyntaxError|NameError|ImportError|ModuleNotFoundError|UnboundLocalError|CompilationError|CalledProcessError)"
)
# A patch to kernels/ shows through Triton alone; the places of tests/harness.py that run something else need not run.
# One to csrc/cuda/ shows in the files called test_cuda_<op>, and no other does in them.
TRITON, CUDA = "kernels/", "csrc/cuda/"
ELSEWHERE = "not reference-cpu and not reference-cuda and not cpu-cpu and not cuda-cuda"


@dataclass
class Result:
    op: str
    mutant: str
    outcome: str
    killed_by: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Baseline:
    """The op's tests on the unpatched copy: node ids, fastest first, and the time they take together."""

    tests: tuple[str, ...]
    seconds: float
    failed: str = ""


def reach_of(patch: Path) -> str:
    """TRITON or CUDA where a patch stays there, else nothing."""
    return next((part for part in (TRITON, CUDA) if all(name.startswith(part) for name in touched(patch))), "")


def patches(ops: list[str] | None = None) -> list[Path]:
    found = sorted(PATCHES.glob("*/*.patch"))
    unknown = set(ops or []) - {path.parent.name for path in found}
    if unknown:
        raise SystemExit(f"no patches of {', '.join(sorted(unknown))} in {PATCHES.relative_to(ROOT)}")
    return [path for path in found if not ops or path.parent.name in ops]


def touched(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)


def apply(patch: Path, tree_root: Path, *options: str) -> str:
    """What git says against it; empty if the patch applies."""
    # Inside a repository git would leave out silently what lies outside the current folder.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree_root.parent)}
    command = ["git", "apply", *options, str(patch)]
    run = subprocess.run(command, cwd=tree_root, env=environment, capture_output=True, text=True)
    return run.stderr.strip() or f"git apply exited with {run.returncode}" if run.returncode else ""


@contextmanager
def copied_tree() -> Iterator[Path]:
    """The working tree as it is, with its built extension, elsewhere."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "tree"
        ignore = shutil.ignore_patterns(".git", ".venv", "build", "results", "__pycache__", ".*_cache", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignore)
        yield copy


def run_tests(copy: Path, arguments: list[str], limit: float | None = None) -> tuple[int, list[tree.Element]]:
    """pytest's exit status (124 past the limit) and its cases."""
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    # Python trusts a .pyc whose source has the same second and size; a patched file may have both.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CI": ""}
    try:
        status = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return 124, []
    return status, list(tree.parse(report).iter("testcase")) if report.exists() else []


def node_id(case: tree.Element) -> str:
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def complaint(case: tree.Element) -> str:
    problem = case.find("failure") if case.find("failure") is not None else case.find("error")
    return "" if problem is None else problem.get("message") or "failed"


def op_files(op: str, tree_root: Path) -> list[str]:
    """The files named after the op: test_kernels_<op>.py, test_cuda_<op>.py, test_<op>.py and their parts,
    test_<op>_<part>.py."""
    names = (f"test_{place}{op}{part}.py" for place in ("kernels_", "cuda_", "") for part in ("", "_*"))
    return [f"tests/{path.name}" for name in names for path in sorted((tree_root / "tests").glob(name))]


def measure(copy: Path, op: str, reach: str) -> Baseline:
    files = [file for file in op_files(op, copy) if not reach or ("/test_cuda_" in file) == (reach == CUDA)]
    start = time.perf_counter()
    status, cases = run_tests(copy, [*files, *(["-k", ELSEWHERE] if reach == TRITON else [])])
    ran = sorted((c for c in cases if c.find("skipped") is None), key=lambda c: float(c.get("time", 0)))
    failed = next((f"{node_id(c)}: {complaint(c)}" for c in ran if complaint(c)), "")
    if status and not failed:
        failed = f"pytest exited with {status}"
    return Baseline(tuple(node_id(c) for c in ran), time.perf_counter() - start, failed)


def try_mutant(patch: Path, copy: Path, baseline: Baseline) -> Result:
    result = Result(patch.parent.name, patch.stem, "")
    if baseline.failed:
        result.outcome, result.killed_by = "tests fail without it", baseline.failed.splitlines()[0]
        return result
    # Of the copy: someone may be at work on the tree that it was taken from.
    unpatched = {name: (copy / name).read_bytes() for name in touched(patch) if (copy / name).exists()}
    if complained := apply(patch, copy):
        result.outcome, result.killed_by = "does not apply", complained.splitlines()[0]
        return result
    start = time.perf_counter()
    try:
        status, cases = run_tests(copy, ["-x", *baseline.tests], limit=120 + 5 * baseline.seconds)
    finally:
        for name, text in unpatched.items():
            (copy / name).write_bytes(text)
    result.seconds = round(time.perf_counter() - start, 1)
    result.outcome, result.killed_by = verdict(status, cases)
    return result


def verdict(status: int, cases: list[tree.Element]) -> tuple[str, str]:
    """The outcome of a patched run, and the test that noticed or what broke."""
    if status == 0:
        return "survived", ""
    if status == 124:
        return "killed", "the time limit"
    if status < 0:
        return "killed", f"a crash, signal {-status}"
    failed = next((case for case in cases if complaint(case)), None)
    if status != 1 or failed is None:
        return "broken", f"pytest exited with {status}" + (f": {complaint(failed)}" if failed is not None else "")
    if BREAKS.match(complaint(failed)):
        return "broken", complaint(failed).splitlines()[0]
    return "killed", node_id(failed).removeprefix("tests/")


def survey(chosen: list[Path], jobs: int) -> Iterator[Result]:
    """Results as they come; one copy of the tree per worker, one baseline per op and reach."""
    local, lock = threading.local(), threading.Lock()
    baselines: dict[tuple[str, str], Baseline] = {}
    free: list[Path] = []

    def work(patch: Path) -> Result:
        if not hasattr(local, "copy"):
            local.copy = free.pop()
        key = patch.parent.name, reach_of(patch)
        with lock:  # measured while the other workers wait: it orders their tests by time
            if key not in baselines:
                baselines[key] = measure(local.copy, *key)
        return try_mutant(patch, local.copy, baselines[key])

    with ExitStack() as stack:
        free += [stack.enter_context(copied_tree()) for _ in range(jobs)]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(jobs))
        for future in concurrent.futures.as_completed([pool.submit(work, patch) for patch in chosen]):
            yield future.result()


def enough(results: list[Result]) -> bool:
    """Whether the tests pass: every patch is usable, and of the faults they see all but one in twenty."""
    usable = all(result.outcome in ("killed", "survived") for result in results)
    return usable and sum(result.outcome == "killed" for result in results) >= SHARE * len(results)


def write(results: list[Result], path: Path) -> None:
    """As CSV; rows there of ops that were not tried now stay."""
    tried = {result.op for result in results}
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    rows = [row for row in rows if row["op"] not in tried] + [asdict(result) for result in results]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["op"], row["mutant"])))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="the ops whose faults are planted; all by default")
    parser.add_argument("--list", action="store_true", help="print the patches and do nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults tried at the same time")
    parser.add_argument("--csv", type=Path, help="write the results there too")
    options = parser.parse_args(arguments)
    chosen = patches(options.ops)
    if options.list:
        print("\n".join(f"{path.parent.name:<14}{path.stem}" for path in chosen))
        return 0
    results = []
    for result in survey(chosen, max(1, min(options.jobs, len(chosen)))):
        print(
            f"{result.op:<14}{result.mutant:<44}{result.outcome:<16}{result.seconds:>6.1f} s  {result.killed_by}",
            flush=True,
        )
        results.append(result)
    results.sort(key=lambda result: (result.op, result.mutant))
    if options.csv:
        write(results, options.csv)
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in OUTCOMES}
    print(f"{len(results)} faults: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))
    return 0 if enough(results) else 1


if __name__ == "__main__":
    sys.exit(main())
