"""`fastvit profile`: where a pass spends its time, op by op, each beside the least that its work allows."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import rich.console
import typer

from .terminal import (
    Json,
    UsageError,
    as_usage_errors,
    backend_names,
    benchmarks,
    checked_name,
    checked_names,
    finite,
    progress,
    torch_device,
)

MODEL = "vit_base_patch16_224"


def profile(
    model: Annotated[str, typer.Option(help="Model name.")] = MODEL,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size.  [default: 1, on a GPU 256]")] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Side in pixels.  [default: its own]")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks to keep, the first ones.  [default: all]")] = None,
    dtype: Annotated[str, typer.Option(help="Its dtype, or int8.  [default: float32, on a GPU bfloat16]")] = "",
    direction: Annotated[
        list[str] | None, typer.Option(help="forward (default), training; repeat it or separate by commas.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="eager or a backend, likewise.  [default: eager,auto]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = "",
    by_op: Annotated[
        bool, typer.Option("--by-op", help="Also run blocks op by op where one kernel runs them whole.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Profiled passes; 0 takes as many as fit in 4 s.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random weights and images.")] = 0,
    trace: Annotated[
        Path | None, typer.Option(help="Write traces for chrome://tracing, named after this file.")
    ] = None,
    json: Json = False,
) -> None:
    """Show where one pass spends its time: each op's share, speed, and distance from its roof."""
    import torch

    import fastvit

    cases, suite, profiles, table = map(benchmarks, ("cases", "suite", "profile", "profile_table"))

    if threads:
        torch.set_num_threads(threads)
    place = torch_device(device)
    gpu = place.type == "cuda"
    with as_usage_errors(ValueError, suite.UnavailableError):
        its_dtype = checked_name(cases.ALIASES.get(dtype, dtype), cases.MODEL_DTYPES, "dtype")
        its_dtype = its_dtype or ("bfloat16" if gpu else "float32")
        name = checked_name(model, fastvit.list_models(), "model", MODEL)
        ways = checked_names(direction, cases.DIRECTIONS, "direction") or [cases.FORWARD]
        wanted = [cases.Case(name, batch or (256 if gpu else 1), its_dtype, way, img_size) for way in ways]
        chosen = checked_names(backend, [suite.EAGER, *backend_names()], "backend") or [suite.EAGER, "auto"]
        ours = [one for one in chosen if one != suite.EAGER]
        if ours:
            suite.candidates(place, ours, int8=its_dtype == cases.INT8)
        if trace is not None and not trace.parent.is_dir():
            raise UsageError(f"{trace.parent}: no such directory")
        options = profiles.Options(place, tuple(chosen), depth, by_op, repeats or None, seed, trace)
        found: list[Any] = []
        with progress(len(wanted)) as show:
            for number, case in enumerate(wanted):

                def report(provider: str, done: int, of: int, number: int = number, title: str = case.title) -> None:
                    show(number + done / of, title, provider)

                found += profiles.run_case(case, options, report)
    _show(table, found, json, place)


def _show(table: Any, found: list[Any], json: bool, device: Any) -> None:
    stamp = benchmarks("environment").stamp(device)
    if json:
        told = [_finite(table.as_dict(one)) | {"next": table.advice(one)} for one in found]
        print(json_module.dumps({"profiles": told, "environment": stamp}, indent=2))
        return
    console = rich.console.Console(highlight=False)
    if console.is_terminal:
        for one in found:
            console.print(table.rich_table(one))
    else:
        print(table.plain(found))
    where = f"torch {stamp['torch']}, fastvit {stamp['fastvit']} ({stamp['commit']}); {stamp['device']}"
    for note in [*table.footnotes(found), where, table.LEGEND]:
        print(note, file=sys.stdout if console.is_terminal else sys.stderr)


def _finite(told: dict[str, Any]) -> dict[str, Any]:
    """A profile without numbers that JSON does not know."""
    lines = [{key: finite(value) for key, value in line.items()} for line in told["lines"]]
    return {key: finite(value) for key, value in told.items()} | {"lines": lines}
