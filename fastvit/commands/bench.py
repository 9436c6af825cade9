"""`fastvit bench`: whole models timed, each checked against fp64."""

import functools
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
    checked_name,
    checked_names,
    checked_positives,
    finite,
    progress,
    split_commas,
    torch_device,
)


def bench(
    grid: Annotated[str, typer.Option(help="Cases to measure; the options below replace its own.")] = "default",
    model: Annotated[list[str] | None, typer.Option(help="Model name; repeat it or separate by commas.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch size, likewise.")] = None,
    img_size: Annotated[list[str] | None, typer.Option(help="Side in pixels, likewise.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, int8, likewise.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, training, likewise.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, likewise.  [default: all that run here]")] = None,
    images: Annotated[Path | None, typer.Option(help="Directory of images.  [default: two photographs]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile of the eager model.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also time other engines and libraries.")] = False,
    peer: Annotated[list[str] | None, typer.Option(help="Only these of them, likewise.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0: as many as fit in --seconds.")] = 0,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing, per case.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file, replacing equal keys.")] = None,
    results: Annotated[Path | None, typer.Option(help="Directory for rows, pictures and a report, likewise.")] = None,
    json: Json = False,
) -> None:
    """Time whole models: eager, torch.compile on request and every fastvit backend, checked against fp64.

    The cases are those of a grid: default (ViT-B on two photographs), peers, growth, training, gpu, full. Fails when a
    provider of fastvit is wrong; such a provider gets no ratio.
    """
    import torch

    from fastvit import images as pictures

    cases, photos, tables, suite = map(benchmarks, ("cases", "images", "rows", "suite"))
    table, engines, measure = map(benchmarks, ("table", "engines", "measure"))

    if threads:
        torch.set_num_threads(threads)
    place = torch_device(device)
    names = [name for engine in engines.ENGINES for name in engine.names]
    with as_usage_errors(ValueError, suite.UnavailableError):
        wanted = _cases(cases, grid, model, batch, dtype, direction, img_size)
        dtypes = list(dict.fromkeys(case.dtype for case in wanted))
        chosen, left_out = suite.candidates(
            place, checked_names(backend, backend_names(), "backend"), int8=cases.INT8 in dtypes
        )
        asked = checked_names(peer, names, "peer")
        peers = peers or bool(asked)
        if peers and any(case.direction != cases.FORWARD for case in wanted):
            raise UsageError("--peers measures forward passes; --compile also training steps")
        target = results_file(csv, results, place)
        files = pictures.list_images(images) if images else photos.photographs()
    others, slow = engines.chosen(asked, place.type) if peers else ((), {})
    options = suite.Options(
        device=place,
        backends=chosen,
        images=tuple(files),
        images_label=images.resolve().name if images else "scikit-learn's two photographs",
        compile=compile,
        repeats=repeats or None,
        seed=seed,
        engines=others,
        budget_s=seconds,
    )
    keep = functools.partial(tables.write, target) if target else None
    if peers:
        left_out.update(slow)
        left_out.update(engines.left_out(others, dtypes, place.type))
        for line in measure.peak_lines(place, [case.compute for case in wanted]):  # a busy machine shows at once
            print(line, file=sys.stderr)

    def run(case: Any, report: Callable[..., None]) -> list[dict]:
        measured = suite.run_case(case, options, report)
        left_out.update(measured.left_out)
        return measured.rows

    with as_usage_errors(pictures.ImageError):
        rows = _measure([case.title for case in wanted], [functools.partial(run, case) for case in wanted], keep)
    _show(table, rows, left_out, json)
    draw(results)
    _refuse_failures("bench", rows)


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


def results_file(csv: Path | None, results: Path | None, place: Any) -> Path | None:
    """Where rows go: the file of --csv, this device's file in the folder of --results, or nowhere."""
    if csv is not None and results is not None:
        raise UsageError("--csv and --results both say where rows go: give one of them")
    environment, tables = map(benchmarks, ("environment", "rows"))
    target = csv if results is None else tables.path_of(results, environment.device_name(place))
    if target is not None:
        tables.read(target)  # what is no table of rows is refused before anything is measured
    return target


def draw(results: Path | None) -> None:
    """The pictures and the report of a folder of results."""
    if results is not None:
        plot, tables = map(benchmarks, ("plot", "rows"))
        for path in plot.draw_all(tables.read_folder(results), results):
            print(path, file=sys.stderr)


def _report(show: Callable[..., None], number: int, title: str, stage: str, done: int, of: int) -> None:
    timing = stage == "time"
    show(number + (done / of if timing else 0.0), title, f"round {done} of {of}" if timing else stage)


def _refuse_failures(command: str, rows: Iterable[dict]) -> None:
    failed = sorted({row["provider"] for row in rows if row["status"] != "ok"})
    if failed:
        raise UsageError(f"{command}: {', '.join(failed)} FAILED, see above")


def _cases(
    cases: Any,
    grid: str,
    model: list[str] | None,
    batch: list[str] | None,
    dtype: list[str] | None,
    direction: list[str] | None,
    img_size: list[str] | None,
) -> list[Any]:
    """The cases of a grid, or every combination of the models, sizes, dtypes and batch sizes that were asked for."""
    import fastvit

    return cases.grid(
        checked_name(grid, list(cases.GRIDS), "grid"),
        checked_names(model, fastvit.list_models(), "model"),
        checked_positives(batch, "batch"),
        checked_names([cases.ALIASES.get(name, name) for name in split_commas(dtype)], cases.MODEL_DTYPES, "dtype"),
        checked_names(direction, cases.DIRECTIONS, "direction"),
        checked_positives(img_size, "img-size"),
    )


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
