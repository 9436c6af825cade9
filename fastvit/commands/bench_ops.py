"""`fastvit bench-ops`: single ops timed, each checked against fp64."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .measuring import draw, refuse_failures, results_file, run_cases, show
from .terminal import (
    Json,
    as_usage_errors,
    backend_names,
    benchmarks,
    checked_names,
    checked_positives,
    split_commas,
    torch_device,
)


def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="Op; repeat it or separate by commas.  [default: all]")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model whose shapes to take, likewise.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch size, likewise.")] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="Tokens, likewise.  [default: the model's]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, likewise.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, backward, forward+backward, likewise.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, likewise.  [default: all that run here]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile of eager, in every way.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also time oneDNN's packed product, other libraries.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0: those of 0.7 s, at least 15, on a GPU 25.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random tensors.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file, replacing equal keys.")] = None,
    results: Annotated[Path | None, typer.Option(help="Directory for this device's rows, pictures, a report.")] = None,
    json: Json = False,
) -> None:
    """Time single ops, checked against fp64: eager, SDPA's backends, every fastvit backend, on request their peers.

    Which shapes: benchmarks/op_cases.py; --op narrows them, other options replace them. Fails when an output or a
    gradient of fastvit's is wrong; it gets no ratio then. A peer that is wrong keeps its speed, with a note.
    """
    import torch

    import fastvit

    cases, op_cases, op_peers, suite = map(benchmarks, ("cases", "op_cases", "op_peers", "suite"))
    op_suite, tables, table = map(benchmarks, ("op_suite", "rows", "table"))

    if threads:
        torch.set_num_threads(threads)
    place = torch_device(device)
    with as_usage_errors(ValueError, suite.UnavailableError):
        wanted, impossible = op_cases.grid(
            place.type == "cuda",
            checked_names(op, [*op_cases.OPS, *op_cases.GROUPS], "op"),
            checked_names(model, fastvit.list_models(), "model"),
            checked_positives(batch, "batch"),
            checked_names([cases.ALIASES.get(name, name) for name in split_commas(dtype)], list(cases.DTYPES), "dtype"),
            checked_names(direction, op_cases.DIRECTIONS, "direction"),
            checked_positives(tokens, "tokens"),
        )
        chosen, left_out = op_suite.candidates(place, checked_names(backend, backend_names(), "backend"))
        target = results_file(csv, results, place)
    others = (*(op_peers.COMPILERS if compile else ()), *(op_peers.PEERS if peers else ()))
    options = op_suite.Options(place, chosen, others, repeats or None, seed)
    left_out |= impossible | op_peers.left_out(others, place, wanted)

    def run(case: Any, report: Callable[..., None]) -> list[dict]:
        measured = op_suite.run_case(case, options, report)
        left_out.update({f"{name} ({case.op} {case.dtype})": why for name, why in measured.left_out.items()})
        return measured.rows

    titles = [f"{case.op} {case.shape} {case.direction}" for case in wanted]
    runs = [functools.partial(run, case) for case in wanted]
    rows = run_cases(titles, runs, functools.partial(tables.write, target) if target else None)
    show(table, rows, left_out, json)
    draw(results)
    refuse_failures("bench-ops", rows)
