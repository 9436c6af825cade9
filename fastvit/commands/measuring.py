"""What `fastvit bench` and `fastvit bench-ops` share: cases under a progress bar, rows into files, the last table."""

import functools
import json as json_module
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import rich.console

from .terminal import UsageError, benchmarks, finite, progress


def run_cases(
    titles: Sequence[str], runs: Sequence[Callable[..., list[dict]]], keep: Callable[[list[dict]], object] | None
) -> list[dict]:
    """Run the cases under a progress bar; rows are kept case by case, so that an interruption loses only one."""
    rows: list[dict] = []
    with progress(len(runs)) as tell:
        for number, (title, run) in enumerate(zip(titles, runs, strict=True)):
            measured = run(functools.partial(_report, tell, number, f"{number + 1}/{len(runs)}  {title}"))
            rows += measured
            if keep is not None:
                keep(measured)
    return rows


def results_file(csv: Path | None, results: Path | None, place: Any) -> Path | None:
    """Where rows go: the file of --csv, this device's file in the folder of --results, or nowhere.

    Raises:
        ValueError: before anything is measured: that file is no table of rows, nothing can be written or drawn there.
    """
    from fastvit import figures

    if csv is not None and results is not None:
        raise UsageError("--csv and --results both say where rows go: give one of them")
    environment, tables = map(benchmarks, ("environment", "rows"))
    target = csv if results is None else tables.path_of(results, environment.device_name(place))
    if target is not None:
        tables.read(target)
    if results is not None:
        figures.check_target(results / "models.png")
    return target


def draw(results: Path | None) -> None:
    """The pictures and the report of a folder of results."""
    if results is not None:
        plot, tables = map(benchmarks, ("plot", "rows"))
        for path in plot.draw_all(tables.read_folder(results), results):
            print(path, file=sys.stderr)


def _report(tell: Callable[..., None], number: int, title: str, stage: str, done: int, of: int) -> None:
    timing = stage == "time"
    tell(number + (done / of if timing else 0.0), title, f"round {done} of {of}" if timing else stage)


def refuse_failures(command: str, rows: Iterable[dict]) -> None:
    """Make the command fail when a provider did, once everything else is done."""
    failed = sorted({row["provider"] for row in rows if row["status"] != "ok"})
    if failed:
        raise UsageError(f"{command}: {', '.join(failed)} FAILED, see above")


def show(table: Any, rows: list[dict], left_out: dict[str, str], json: bool) -> None:
    """Print the rows, and below them what there is to say about them."""
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
