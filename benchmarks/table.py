"""Rows as a table: colours and rules in a terminal, aligned plain cells anywhere else.

python -m fastvit.benchmarks.table ROWS.csv
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from . import cases
from .rows import MODEL, OP, of_level, read

Row = Mapping[str, object]

NOISY = 1.3  # 80th over 20th percentile of one provider's rounds; a quiet machine stays under 1.1

_DASH = "-"


def _number(row: Row, column: str, digits: str) -> str:
    value = row.get(column)
    return _DASH if value in (None, "") else format(float(value), digits)  # type: ignore[arg-type]


def _speed(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _scaled(row: Row, column: str) -> str:
    value = row.get(column)
    return _DASH if value in (None, "") else _speed(float(value))  # type: ignore[arg-type]


def _ratio(row: Row) -> str:
    if row["status"] != "ok":
        return str(row["status"])
    return f"{text}x" if (text := _number(row, "ratio", ".2f")) != _DASH else _DASH


def _error_ratio(row: Row) -> str:
    return f"{text}x" if (text := _number(row, "error_ratio", ".2f")) != _DASH else _DASH


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("img/s", lambda row: _scaled(row, "images_per_s")),
    ("ms", lambda row: _scaled(row, "median_ms")),
    ("GFLOP/s", lambda row: _scaled(row, "gflops")),
    ("peak", lambda row: _number(row, "ceiling_share", ".0%")),
    ("vs eager", _ratio),
    ("max error", lambda row: _number(row, "max_error", ".1e")),
    ("rel error", lambda row: _number(row, "relative_error", ".1e")),
    ("error ratio", _error_ratio),
    ("top-1", lambda row: _number(row, "top1_agreement", ".1%")),
    ("+MiB", lambda row: _number(row, "peak_mib", ".0f")),
)

OP_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("ms", lambda row: _number(row, "median_ms", ".3f")),
    ("lone ms", lambda row: _number(row, "call_ms", ".3f")),
    ("GB/s", lambda row: _scaled(row, "gbs")),
    ("GFLOP/s", lambda row: _scaled(row, "gflops")),
    ("roof", lambda row: _number(row, "ceiling_share", ".0%")),
    ("vs eager", _ratio),
    ("max error", lambda row: _number(row, "max_error", ".1e")),
    ("error ratio", _error_ratio),
    ("+MiB", lambda row: _number(row, "peak_mib", ".0f")),
)

LEGEND = (
    "ms: median of interleaved rounds.  peak: share of the fastest arithmetic measured in the same run, a plain matrix "
    "product or multiply-adds on registers.  "
    "max error, rel error: of the logits, in training of all gradients, against fp64, the largest and ‖y - y64‖ / "
    "‖y64‖; error ratio: max error as a multiple of eager's own.  "
    "+MiB: memory one call adds at its highest."
)

OP_LEGEND = (
    "ms: median of interleaved rounds, on a GPU of calls queued back to back with cold caches.  "
    "lone ms: one call with an empty queue, launch included.  "
    "GB/s, GFLOP/s: the least work by formula over the time.  roof: the least time for that work, at the rates of a "
    "plain copy and matrix product measured in the same run, over the time.  max error: of the worst output or "
    "gradient against fp64; error ratio: the same as a multiple of eager's own.  +MiB: memory one call adds."
)


def columns_of(rows: Sequence[Row]) -> tuple[tuple[str, Callable[[Row], str]], ...]:
    """The columns for rows of one level: whole models or ops."""
    return OP_COLUMNS if rows and rows[0].get("level") == OP else COLUMNS


def legend(rows: Sequence[Row]) -> str:
    """What those columns mean."""
    return LEGEND if columns_of(rows) is COLUMNS else OP_LEGEND


def cases_of(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Group consecutive rows by case: (title, rows)."""

    def title(row: Row) -> str:
        if row.get("level") == OP:
            return f"{row['case']}  {row['shape']}  {row['dtype']}  {row['direction']}"
        return "  ".join([str(row["case"]), f"batch {batch_of(row)}", str(row["dtype"]), *variant_of(row)])

    return [(name, list(group)) for name, group in groupby(rows, title)]


def batch_of(row: Row) -> int:
    """B, from the row's shape."""
    return int(str(row["shape"]).split("x", 1)[0])


def variant_of(row: Row) -> list[str]:
    """What sets a row of a whole model apart from the usual one: the size of its images, its direction."""
    height, width = (int(side) for side in str(row["shape"]).split("x")[2:])
    return cases.variant(str(row["case"]), (height, width), str(row.get("direction") or cases.FORWARD))


def _noise(rows: Iterable[Row]) -> list[str]:
    worst = max((float(row["p80_ms"]) / float(row["p20_ms"]) for row in rows if row.get("p20_ms")), default=1.0)  # type: ignore[arg-type]
    if worst < NOISY:
        return []
    return [f"rounds differ by up to {worst:.1f}x: the machine is busy, and ratios this noisy decide nothing"]


def footnotes(rows: Sequence[Row], left_out: Mapping[str, str]) -> list[str]:
    """The sentences under the tables: what failed, what was left out and why, whether to trust it, where, with what."""
    notes = [f"{row['provider']}: {row['note']}" for row in rows if row.get("note")]
    notes += [f"{name} not measured: {reason}" for name, reason in left_out.items()]
    notes += _noise(rows)
    if rows:
        last = rows[-1]
        seen = f"; images: {last['images']}" if last.get("images") else ""
        notes.append(
            f"eager is {last['eager']}; torch {last['torch']}, fastvit {last['fastvit']} ({last['commit']}); "
            f"{last['device']}{seen}"
        )
    return list(dict.fromkeys(notes))


def plain(rows: Sequence[Row]) -> str:
    """One aligned line per row, cells without blanks, for pipes: `| sort`, `| awk '{print $6}'`."""
    if not rows:
        return ""
    columns = columns_of(rows)
    lines = [[*_named(rows[0]), *(title.replace(" ", "_") for title, _ in columns)]]
    lines += [[*_named(row).values(), *(cell(row) for _, cell in columns)] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_align(line, widths, len(_named(rows[0]))) for line in lines)


def _named(row: Row) -> dict[str, str]:
    """The cells that say what a row is about, by their headings."""
    if row.get("level") == OP:
        return {column: str(row[column]) for column in ("case", "shape", "dtype", "direction", "provider")}
    batch = str(batch_of(row))
    model = "/".join([str(row["case"]), *(label.replace(" ", "") for label in variant_of(row))])
    return {"model": model, "batch": batch, "dtype": str(row["dtype"]), "provider": str(row["provider"])}


def _align(line: Sequence[str], widths: Sequence[int], names: int) -> str:
    left = [cell.ljust(width) for cell, width in zip(line[:names], widths[:names], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(line[names:], widths[names:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def rich_tables(rows: Sequence[Row], width: int = 100):
    """One rich table per case that fits a terminal of 80; the fastest sound provider is bold, a failed one red."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    gap = 1 if width >= 90 else 0
    for title, group in cases_of(rows):
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, gap, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        table.add_column("provider", no_wrap=True)
        for heading, _ in columns_of(group):
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
        best = max((float(row["ratio"]) for row in group if row.get("ratio")), default=None)  # type: ignore[arg-type]
        for row in group:
            failed, fastest = row["status"] != "ok", row.get("ratio") == best
            style = "bold red" if failed else "bold" if fastest else ""
            table.add_row(Text(str(row["provider"])), *(cell(row) for _, cell in columns_of(group)), style=style)
        yield table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rows of a CSV file, whole models and ops apart; 0 on success."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        print("usage: python -m fastvit.benchmarks.table ROWS.csv", file=sys.stderr)
        return 2
    try:
        rows = read(given[0])
    except (ValueError, OSError) as error:
        print(f"table: {error}", file=sys.stderr)
        return 1
    print("\n\n".join(text for level in (OP, MODEL) if (text := plain(of_level(rows, level)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
