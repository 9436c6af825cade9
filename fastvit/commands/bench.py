"""`fastvit bench` and `fastvit bench-ops`: whole models and single ops timed, each checked against fp64."""

import functools
import itertools
import json as json_module
import sys
from collections.abc import Callable, Iterable, Sequence
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
    checked_names,
    checked_positives,
    finite,
    progress,
    split_commas,
    torch_device,
)


def bench(
    model: Annotated[list[str] | None, typer.Option(help="Model name; repeat it or separate by commas.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch size, likewise.  [default: 1,8]")] = None,
    img_size: Annotated[list[str] | None, typer.Option(help="Side in pixels, likewise.  [default: its own]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, int8, likewise.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward (default), training, likewise.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, likewise.  [default: all that run here]")] = None,
    images: Annotated[Path | None, typer.Option(help="Directory of images.  [default: two photographs]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile of the eager model.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also time other projects' engines, on a CPU.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0 takes as many as fit in 20 s.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file, replacing equal keys.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a chart of the rows: PNG, SVG or PDF.")] = None,
    json: Json = False,
) -> None:
    """Time whole models: eager, torch.compile on request and every fastvit backend, checked against fp64.

    Fails when a provider of fastvit is wrong; such a provider gets no ratio.
    """
    import torch

    from fastvit import figures, images as pictures

    cases, photos, charts, tables = map(benchmarks, ("cases", "images", "plot", "rows"))
    suite, table, engines, measure = map(benchmarks, ("suite", "table", "engines", "measure"))

    if threads:
        torch.set_num_threads(threads)
    place = torch_device(device)
    with as_usage_errors(ValueError, suite.UnavailableError):
        wanted = _cases(cases, model, batch, dtype, direction, img_size)
        dtypes = list(dict.fromkeys(case.dtype for case in wanted))
        chosen, left_out = suite.candidates(
            place, checked_names(backend, backend_names(), "backend"), int8=cases.INT8 in dtypes
        )
        if peers and (place.type != "cpu" or any(case.direction != cases.FORWARD for case in wanted)):
            raise UsageError("--peers measures forward passes on a CPU")
        if csv is not None:
            tables.read(csv)
        if plot is not None:
            figures.check_target(plot)
        files = pictures.list_images(images) if images else photos.photographs()
    options = suite.Options(
        device=place,
        backends=chosen,
        images=tuple(files),
        images_label=images.resolve().name if images else "scikit-learn's two photographs",
        compile=compile,
        repeats=repeats or None,
        seed=seed,
        engines=engines.ENGINES if peers else (),
    )
    keep = functools.partial(tables.write, csv) if csv else None
    if peers:
        left_out.update(engines.left_out(dtypes))
        for line in measure.peak_lines(place, [case.compute for case in wanted]):  # a busy machine shows at once
            print(line, file=sys.stderr)

    def run(case: Any, report: Callable[..., None]) -> list[dict]:
        measured = suite.run_case(case, options, report)
        left_out.update(measured.left_out)
        return measured.rows

    with as_usage_errors(pictures.ImageError):
        rows = _measure([case.title for case in wanted], [functools.partial(run, case) for case in wanted], keep)
    if plot is not None:
        charts.draw(rows, plot)
    _show(table, rows, left_out, json)
    _refuse_failures("bench", rows)


def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="Op; repeat it or separate by commas.  [default: all]")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model whose shapes to take, likewise.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch size, likewise.")] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="Tokens, likewise.  [default: the model's]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, likewise.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, backward, forward+backward, likewise.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, likewise.  [default: all that run here]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile of eager.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0: as many as fit in 2 s, on a GPU 25.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random tensors.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file, replacing equal keys.")] = None,
    json: Json = False,
) -> None:
    """Time single ops, checked against fp64: eager, SDPA's backends, torch.compile on request, every fastvit backend.

    Fails when a provider's output or gradients are wrong; such a provider gets no ratio.
    """
    import torch

    import fastvit

    cases, op_cases, suite = map(benchmarks, ("cases", "op_cases", "suite"))
    op_suite, tables, table = map(benchmarks, ("op_suite", "rows", "table"))

    if threads:
        torch.set_num_threads(threads)
    place = torch_device(device)
    with as_usage_errors(ValueError, suite.UnavailableError):
        wanted = op_cases.grid(
            place.type == "cuda",
            checked_names(op, [*op_cases.OPS, *op_cases.GROUPS], "op"),
            checked_names(model, fastvit.list_models(), "model"),
            checked_positives(batch, "batch"),
            checked_names([cases.ALIASES.get(name, name) for name in split_commas(dtype)], list(cases.DTYPES), "dtype"),
            checked_names(direction, op_cases.DIRECTIONS, "direction"),
            checked_positives(tokens, "tokens"),
        )
        chosen, left_out = op_suite.candidates(place, checked_names(backend, backend_names(), "backend"))
        if csv is not None:
            tables.read(csv)
    options = op_suite.Options(place, chosen, compile, repeats or None, seed)

    def run(case: Any, report: Callable[..., None]) -> list[dict]:
        measured = op_suite.run_case(case, options, report)
        left_out.update({f"{name} ({case.op} {case.dtype})": why for name, why in measured.left_out.items()})
        return measured.rows

    titles = [f"{case.op} {case.shape} {case.direction}" for case in wanted]
    runs = [functools.partial(run, case) for case in wanted]
    rows = _measure(titles, runs, functools.partial(tables.write, csv) if csv else None)
    _show(table, rows, left_out, json)
    _refuse_failures("bench-ops", rows)


def _measure(
    titles: Sequence[str], runs: Sequence[Callable[..., list[dict]]], keep: Callable[[list[dict]], object] | None
) -> list[dict]:
    """Run the cases under a progress bar; rows are kept case by case, so that an interruption loses only one."""
    rows: list[dict] = []
    with progress(len(runs)) as show:
        for number, (title, run) in enumerate(zip(titles, runs, strict=True)):
            measured = run(functools.partial(_report, show, number, f"{number + 1}/{len(runs)}  {title}"))
            rows += measured
            if keep is not None:
                keep(measured)
    return rows


def _report(show: Callable[..., None], number: int, title: str, stage: str, done: int, of: int) -> None:
    timing = stage == "time"
    show(number + (done / of if timing else 0.0), title, f"round {done} of {of}" if timing else stage)


def _refuse_failures(command: str, rows: Iterable[dict]) -> None:
    failed = sorted({row["provider"] for row in rows if row["status"] != "ok"})
    if failed:
        raise UsageError(f"{command}: {', '.join(failed)} FAILED, see above")


def _cases(
    cases: Any,
    model: list[str] | None,
    batch: list[str] | None,
    dtype: list[str] | None,
    direction: list[str] | None,
    img_size: list[str] | None,
) -> list[Any]:
    """Every combination of the models, sizes, dtypes and batch sizes that were asked for."""
    import fastvit

    models = checked_names(model, fastvit.list_models(), "model") or list(cases.DEFAULT_MODELS)
    spelled = [cases.ALIASES.get(name, name) for name in split_commas(dtype)]
    dtypes = checked_names(spelled, list(cases.MODEL_DTYPES), "dtype") or list(cases.DEFAULT_DTYPES)
    batches = checked_positives(batch, "batch") or list(cases.DEFAULT_BATCHES)
    directions = checked_names(direction, cases.DIRECTIONS, "direction") or [cases.FORWARD]
    sizes: Sequence[int | None] = checked_positives(img_size, "img-size") or [None]
    grid = itertools.product(models, directions, sizes, dtypes, batches)
    return [cases.Case(m, b, dtype, way, size) for m, way, size, dtype, b in grid]


def _show(table: Any, rows: list[dict], left_out: dict[str, str], json: bool) -> None:
    if json:
        clean = [{key: finite(value) for key, value in row.items()} for row in rows]
        print(json_module.dumps({"rows": clean, "not_measured": left_out}, indent=2))
        return
    console = rich.console.Console(highlight=False)
    if console.is_terminal:
        for one in table.rich_tables(rows, console.width):
            console.print(one)
            console.print()
    else:
        print(table.plain(rows))
    for note in [*table.footnotes(rows, left_out), table.legend(rows)]:
        print(note, file=sys.stdout if console.is_terminal else sys.stderr)
