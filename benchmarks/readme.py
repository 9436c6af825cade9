"""Write the README's tables from the committed rows: `python -m fastvit.benchmarks.readme [--check]`."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from . import compatibility, plot, report, rows as rows_module, summary
from .standings import Standing, devices, is_sound, number, order, provider, standings

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("benchmarks") / "results"

Row = Mapping[str, object]
Column = tuple[str, Callable[[Standing], str]]

PICTURE = "summary"  # the one that stands in the README, of the devices that have it
FAILURES = 5  # that are named one by one

_COMMON: tuple[Column, ...] = (
    ("eager ms", lambda s: summary.milliseconds(number(s.eager, "median_ms"))),
    ("fastvit ms", summary.ours_ms),
    ("vs eager", lambda s: summary.cell(s.against_eager, ".2f", "x")),
    ("best peer", lambda s: provider(s.peer) if s.peer else "-"),
    ("vs best peer", lambda s: summary.cell(s.against_peer, ".2f", "x")),
)
MODEL_COLUMNS: tuple[Column, ...] = (
    ("case", lambda s: s.title),
    *_COMMON,
    ("of ceiling", lambda s: _sound(s, "ceiling_share", ".0%")),
    ("error ratio", lambda s: _sound(s, "error_ratio", ".2f", "x")),
)
OP_COLUMNS: tuple[Column, ...] = (
    ("op", lambda s: s.title),
    *_COMMON,
    ("of roof", lambda s: _sound(s, "ceiling_share", ".0%")),
)

LEGEND = (
    "ms: medians of interleaved rounds. best peer: the fastest that is neither eager nor fastvit. of ceiling: share of "
    "the fastest arithmetic measured in the same run; of roof: least time for the op's FLOPs and bytes, at the rates "
    "measured beside it, over its time. error ratio: largest error against fp64 as a multiple of eager's own."
)


def section(rows: Iterable[Row]) -> str:
    """The Markdown between the markers: per device a picture, a table of models, one of ops, and what was left out."""
    found = devices(rows)
    if not found:
        return "No rows are committed yet; `make bench` measures your machine.\n"
    return "\n".join([*(_of_device(device, group) for device, group in found.items()), f"{LEGEND}\n"])


def render(readme: str, rows: Iterable[Row]) -> str:
    """The README with its result section replaced.

    Raises:
        ValueError: there is not exactly one section.
    """
    return replace(readme, "bench", section(rows))


def replace(readme: str, name: str, content: str) -> str:
    """The README with the section of that name replaced.

    Raises:
        ValueError: there is not exactly one section.
    """
    marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    text, found = marked.subn(lambda match: match[1] + content + match[2], readme)
    if found != 1:
        raise ValueError(f"README.md: expected one section from {name}:begin to {name}:end, found {found}")
    return text


def written(readme: str) -> str:
    """The README with every section as the committed rows say."""
    return replace(render(readme, committed_rows()), "compatibility", compatibility.section(compatibility.read()))


def committed_rows() -> list[dict[str, str]]:
    """Every benchmark row that is committed, of models and of ops."""
    return rows_module.read_folder(ROOT / FOLDER)


def _of_device(device: str, rows: Sequence[Row]) -> str:
    found = standings(sorted(rows, key=order))
    models, ops = [s for s in found if not s.is_op], [s for s in found if s.is_op]
    blocks = [f"**{device}**"]
    for name, part in (("Whole models", models), ("Single ops", ops)):
        if part:
            blocks.append(f"{summary.overall(part, name)}.")
    if models:
        picture = FOLDER / plot.file_name(device, PICTURE)
        blocks.append(f"![Speed of whole models on {device} as a multiple of eager's]({picture.as_posix()})")
        blocks.append(_table(MODEL_COLUMNS, summary.models(models)))
    if ops:
        blocks.append(_table(OP_COLUMNS, summary.ops(ops)))
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in _notes(device, models, ops))]) + "\n"


def _table(columns: Sequence[Column], found: Iterable[Standing]) -> str:
    texts = {"case", "op", "best peer"}
    lines = [_line(name for name, _ in columns), _line("---" if name in texts else "---:" for name, _ in columns)]
    return "\n".join([*lines, *(_line(cell(s) for _, cell in columns) for s in found)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _sound(s: Standing, column: str, digits: str, unit: str = "") -> str:
    return summary.cell(number(s.ours, column) if is_sound(s.ours) else None, digits, unit)


def _notes(device: str, models: Sequence[Standing], ops: Sequence[Standing]) -> list[str]:
    """Where the rest is, what failed and why, what the runs said of themselves, and what they were made with."""
    shown = [
        f"{len(chosen)} of {len(part)} cases of {name}"
        for part, chosen, name in ((models, summary.models(models), "models"), (ops, summary.ops(ops), "ops"))
        if part
    ]
    rest = f"[{report.NAME}]({(FOLDER / report.NAME).as_posix()})"
    table_of_rows = rows_module.path_of(FOLDER, device)
    notes = [f"{' and '.join(shown)}; all of them in [{table_of_rows.name}]({table_of_rows.as_posix()}) and {rest}."]
    failed = [(s, row) for s in (*models, *ops) for row in s.failed]
    notes += [
        f"{row['status']}: {row['provider']}, {s.title}: {row.get('note') or '-'}" for s, row in failed[:FAILURES]
    ]
    if len(failed) > FAILURES:
        notes.append(f"{len(failed) - FAILURES} more failed.")
    wholes = [row for s in models or ops for row in s.rows]
    return notes + [f"{note}." for note in summary.notes(wholes)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite README.md, or with --check only say whether it and the pictures are what the rows say."""
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.readme", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if rows, tables and pictures differ"
    )
    given = parser.parse_args(arguments)
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = written(before)
    if given.check:
        wrong = ["README.md: a table is not what its rows say: run `make readme`"] if after != before else []
        wrong += [
            f"{FOLDER / fault}: run `make plot RESULTS={FOLDER}`"
            for fault in plot.stale(committed_rows(), ROOT / FOLDER)
        ]
        print("".join(f"{fault}\n" for fault in wrong), end="", file=sys.stderr)
        return 1 if wrong else 0
    if after != before:
        path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
