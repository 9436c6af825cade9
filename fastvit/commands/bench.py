"""`fastvit bench`: whole models timed, each checked against fp64."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .measuring import draw, refuse_failures, results_file, run_cases, show
from .terminal import (
    Json,
    UsageError,
    as_usage_errors,
    backend_names,
    benchmarks,
    checked_name,
    checked_names,
    checked_positives,
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
    results: Annotated[Path | None, typer.Option(help="Directory for this device's rows, pictures, a report.")] = None,
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
        rows = run_cases([case.title for case in wanted], [functools.partial(run, case) for case in wanted], keep)
    show(table, rows, left_out, json)
    draw(results)
    refuse_failures("bench", rows)


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
