"""Rows as a table: colours and rules in a terminal, aligned plain cells anywhere else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

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
    ("error ratio", _error_ratio),
    ("top-1", lambda row: _number(row, "top1_agreement", ".1%")),
    ("+MiB", lambda row: _number(row, "peak_mib", ".0f")),
)

LEGEND = (
    "ms: median of interleaved rounds.  peak: share of the fastest plain matrix product measured in the same run.  "
    "max error: logits against fp64; error ratio: the same as a multiple of eager's own.  "
    "+MiB: memory one forward pass adds at its highest."
)


def cases_of(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Group consecutive rows by case: (title, rows)."""

    def title(row: Row) -> str:
        return f"{row['case']}  batch {batch_of(row)}  {row['dtype']}"

    return [(name, list(group)) for name, group in groupby(rows, title)]


def batch_of(row: Row) -> int:
    """B, from the row's shape."""
    return int(str(row["shape"]).split("x", 1)[0])


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
        notes.append(
            f"eager is {last['eager']}; torch {last['torch']}, fastvit {last['fastvit']} ({last['commit']}); "
            f"{last['device']}; images: {last['images']}"
        )
    return list(dict.fromkeys(notes))


def plain(rows: Sequence[Row]) -> str:
    """One aligned line per row, cells without blanks, for pipes: `| sort`, `| awk '{print $6}'`."""
    header = ["model", "batch", "dtype", "provider", *(title.replace(" ", "_") for title, _ in COLUMNS)]
    lines = [header]
    for row in rows:
        cells = [cell(row) for _, cell in COLUMNS]
        lines.append([str(row["case"]), str(batch_of(row)), str(row["dtype"]), str(row["provider"]), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(_align(line, widths) for line in lines)


def _align(line: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(line[:4], widths[:4], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
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
        for heading, _ in COLUMNS:
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
        best = max((float(row["ratio"]) for row in group if row.get("ratio")), default=None)  # type: ignore[arg-type]
        for row in group:
            failed, fastest = row["status"] != "ok", row.get("ratio") == best
            style = "bold red" if failed else "bold" if fastest else ""
            table.add_row(Text(str(row["provider"])), *(cell(row) for _, cell in COLUMNS), style=style)
        yield table
