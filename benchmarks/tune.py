"""Search faster configurations of the Triton kernels on the GPU at hand, and print them as a table to commit.

    python -m fastvit.benchmarks.tune [--op attention] [--direction forward] [--budget 300] [--json FILE]

Each op runs at a model's shape, and the choices that `kernels/_tuning.py` makes for it are changed one at a time,
uphill: every legal neighbour of the best so far is compiled and run in another process first (a crash costs that one
alone), held to the tolerance rule beside eager, and timed interleaved with cold caches. Nothing is written into
`_tuning.py`: a person does that, with the figures as the reason, and runs the tests again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import clocks, environment, measure, op_calls, op_cases, op_suite, suite
from .choices import BACKEND, Key, Workers, answering, legal_neighbours

FASTER = 0.98  # a neighbour must take less than this share of the best one's time
OUT_OF_TIME = "no time left"
CLIMB_ROUNDS, FINAL_ROUNDS = 5, 21

Clock = Callable[[Callable[[], object]], float]


@dataclass
class Finding:
    """What the search said about one question in one case."""

    case: op_cases.OpCase
    key: Key
    before: Any
    after: Any
    before_s: float = 0.0
    after_s: float = 0.0
    tried: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """An entry of a Python dict, question to choice, under the figures that speak for it."""
        case, moved = self.case, self.case.work.bytes(self.case.torch_dtype.itemsize)
        rates = f"{moved / self.after_s / 1e9:,.0f} GB/s"
        if case.work.flops:
            rates += f", {case.work.flops / self.after_s / 1e12:,.0f} TFLOP/s"
        verdict = f"was {self.before_s * 1e6:.1f} us, best" if self.after != self.before else "as it was, best"
        comment = f"# {case.op} {case.shape} {case.dtype} {case.direction}: {self.after_s * 1e6:.1f} us, {rates}"
        return f"{comment}; {verdict} of {self.tried + 1}\n{self.key}: {self.after!r},"


class Bench:
    """One case on one device: its tensors, fp64 results and eager's, and runs under any answers."""

    def __init__(self, case: op_cases.OpCase, device: torch.device) -> None:
        self.case, self.device, self.call = case, device, op_calls.call(case)
        self.given = op_calls.tensors(case, device)
        self.sets = op_suite.cold_copies(case, device, self.given)
        self.wanted = () if case.direction == "forward" else self.call.wanted
        with torch.no_grad():
            self.dy = op_calls.upstream(self.call.eager(**self.given)) if self.wanted else None
        self.exact = op_calls.exact(case, self.given, self.dy)
        self.eager = op_suite.results(self.call.eager, self.given, self.wanted, self.dy)

    def questions(self) -> dict[Key, Any]:
        """What the kernels ask in this case's direction, and what `_tuning` answers."""
        asked: dict[Key, Any] = {}
        with self.scope({}):
            turn = op_suite.prepare(self.case, self.call.fused, [self.given], self.dy)
            with answering({}, asked):
                turn()
        return asked

    @contextlib.contextmanager
    def scope(self, answers: Mapping[Key, Any]) -> Iterator[None]:
        import fastvit

        with fastvit.backend(BACKEND), answering(answers):
            yield

    def why_wrong(self, answers: Mapping[Key, Any]) -> str | None:
        """Why the results under these answers break the tolerance rule, or cannot be computed, or None."""
        try:
            with self.scope(answers):
                got = op_suite.results(self.call.fused, self.given, self.wanted, self.dy)
        except Exception as error:  # out of resources, or the compiler's own: the reason is the answer
            return suite.one_line(error)
        names = ("output", *(f"gradient of {name}" for name in self.wanted))
        return op_suite.judge(names, got, self.exact, self.eager)["note"] or None

    def times(self, choices: Sequence[Mapping[Key, Any]], clock: Clock, rounds: int) -> list[float]:
        """Median seconds under each of several answers, interleaved."""
        providers = []
        for number, answers in enumerate(choices):
            scope = functools.partial(self.scope, answers)
            with scope():
                turn = op_suite.prepare(self.case, self.call.fused, self.sets, self.dy)
            providers.append(measure.Provider(str(number), turn, scope))
        timings = measure.interleave(providers, clock, rounds)
        return [timings[provider.name].median for provider in providers]


def climb(bench: Bench, key: Key, held: dict[Key, Any], clock: Clock, deadline: float, workers: Workers) -> Finding:
    """Walk uphill from a choice until no neighbour is faster or time is up; held are the answers to other questions."""
    start = held[key]
    finding, best, known = Finding(bench.case, key, start, start), start, {start}
    itemsize = bench.case.torch_dtype.itemsize
    while time.monotonic() < deadline:
        fresh = [n for n in legal_neighbours(key, best, itemsize, finding.refused) if n not in known]
        known.update(fresh)
        reasons = workers.why_broken(bench.case, [{**held, key: choice} for choice in fresh])
        sound = []
        for choice, broken in zip(fresh, reasons, strict=True):
            reason = broken or bench.why_wrong({**held, key: choice})
            if reason is None:
                sound.append(choice)
            else:
                finding.refused[repr(choice)] = reason
        finding.tried += len(sound)
        if not sound:
            break
        first, *others = bench.times([{**held, key: choice} for choice in (best, *sound)], clock, CLIMB_ROUNDS)
        fastest = min(others)
        if fastest >= FASTER * first:
            break
        best = sound[others.index(fastest)]
    ends = [{**held, key: choice} for choice in dict.fromkeys((start, best))]
    finding.before_s, *after = bench.times(ends, clock, FINAL_ROUNDS)
    finding.after_s = after[0] if after else finding.before_s
    if finding.after_s < FASTER * finding.before_s:
        finding.after = best
    else:  # the longer measurement takes the gain back
        finding.after_s = finding.before_s
    return finding


@dataclass
class Report:
    """What was found, and for each case that could not be tuned the reason."""

    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def search(
    cases: Sequence[op_cases.OpCase],
    device: torch.device,
    clock: Clock,
    budget_s: float,
    jobs: int,
    tell: Callable[[str], object] = lambda text: None,
) -> Report:
    """Every question of every case, an equal share of the time for each case; tell hears the lines to print."""
    report, end, workers = Report(), time.monotonic() + budget_s, Workers(jobs)
    try:
        for number, case in enumerate(cases):
            share = (end - time.monotonic()) / (len(cases) - number)
            reason = _tune(case, device, clock, share, workers, report.findings, tell) if share > 0 else OUT_OF_TIME
            if reason is not None:
                name = f"{case.op} {case.shape} {case.dtype} {case.direction}"
                report.skipped[name] = reason
                tell(f"# {name}: {reason}")
    finally:
        workers.close()
    return report


def _tune(
    case: op_cases.OpCase,
    device: torch.device,
    clock: Clock,
    budget_s: float,
    workers: Workers,
    findings: list[Finding],
    tell: Callable[[str], object],
) -> str | None:
    """Tune one case; why it cannot be, or None. A kernel that is wrong or does not run as it stands is not tuned."""
    deadline = time.monotonic() + budget_s
    (reason,) = workers.why_broken(case, [{}])
    if reason is not None:
        return reason
    bench = Bench(case, device)
    reason = bench.why_wrong({})
    if reason is not None:
        return reason
    held = bench.questions()
    for key in list(held):
        finding = climb(bench, key, held, clock, deadline, workers)
        held[key] = finding.after
        findings.append(finding)
        tell(finding.line())
    return None


def as_json(report: Report, device: torch.device) -> str:
    """The findings with everything that was refused or skipped, and what they were measured on."""
    told = [
        {
            "case": {**dataclasses.asdict(finding.case), "shape": finding.case.shape},
            "question": str(finding.key),
            "before": repr(finding.before),
            "after": repr(finding.after),
            "before_us": finding.before_s * 1e6,
            "after_us": finding.after_s * 1e6,
            "tried": finding.tried,
            "refused": finding.refused,
        }
        for finding in report.findings
    ]
    return json.dumps({**environment.stamp(device), "findings": told, "skipped": report.skipped}, indent=1)


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.tune", description=lines[0])
    names = [*op_cases.OPS, *op_cases.GROUPS]
    parser.add_argument(
        "--op", nargs="+", choices=names, metavar="OP", default=[], help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument("--model", nargs="+", default=["vit_base_patch16_224"], help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[256], help="default: %(default)s")
    parser.add_argument("--tokens", nargs="+", type=int, default=[], help="default: the model's")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help="default: %(default)s")
    parser.add_argument("--direction", nargs="+", choices=op_cases.DIRECTIONS, default=["forward", "backward"])
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    default = Path(os.environ.get("OUT", "build")) / "tuning.json"
    parser.add_argument("--json", type=Path, default=default, help="default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print the table, write the findings; 0 when every case could be tuned, or the time was up."""
    given = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = suite.why_not_measured(BACKEND, device, whole_model=False)
    if reason is not None:
        print(f"tune: {BACKEND} cannot be measured here: {reason}", file=sys.stderr)
        return 1
    try:
        ops = op_cases.expand(given.op) or op_cases.OPS
        cases = op_cases.product(
            op_cases.Grid(ops, given.model, given.batch, given.dtype, given.direction, given.tokens)
        )
    except (KeyError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    stamp = environment.stamp(device)
    print(f"# {stamp['device']}, torch {stamp['torch']}, triton {stamp['triton']}, {stamp['date'][:10]}")
    report = search(cases, device, clocks.Burst(device), given.budget, given.jobs, lambda text: print(text, flush=True))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(as_json(report, device), encoding="utf-8")
    return int(any(reason != OUT_OF_TIME for reason in report.skipped.values()))


if __name__ == "__main__":
    sys.exit(main())
