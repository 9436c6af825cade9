"""Write the README's tables from the committed rows: `python -m fastvit.benchmarks.readme [--check]`."""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import compatibility, rows as rows_module, table

ROOT = Path(__file__).resolve().parent.parent

Row = Mapping[str, object]

# What a reader asks for: what he has, what he gets, and the best that he could have instead. The others are in the CSV.
SHOWN = ("eager", "fastvit")


def section(rows: Iterable[Row]) -> str:
    """The Markdown between the markers: one table per device, with what it was measured with below."""
    devices: dict[str, list[Row]] = {}
    for row in rows:
        devices.setdefault(str(row["device"]), []).append(row)
    if not devices:
        return "No rows are committed yet; `make bench` measures your machine.\n"
    return "\n".join(_of_device(device, group) for device, group in sorted(devices.items()))


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


def committed_rows(folder: Path = ROOT / "benchmarks" / "results") -> list[dict[str, str]]:
    """Every row of the model benchmarks in a folder."""
    return rows_module.of_level(rows_module.read_folder(folder), rows_module.MODEL)


def _of_device(device: str, rows: Sequence[Row]) -> str:
    lines = [_line(["case", "provider", *(title for title, _ in table.COLUMNS)])]
    lines.append(_line(["---", "---", *("---:" for _ in table.COLUMNS)]))
    for title, group in table.cases_of(rows):
        best = _best_peer(group)
        shown = [row for row in group if row["provider"] in SHOWN or row["status"] != "ok" or row is best]
        lines += [_line([title, str(row["provider"]), *(cell(row) for _, cell in table.COLUMNS)]) for row in shown]
    notes = [f"- {note}" for note in (table.LEGEND, *table.footnotes(rows, {}))]
    return "\n".join([f"**{device}**", "", *lines, "", *notes, ""])


def _best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest of those that are neither eager nor fastvit."""
    peers = [r for r in rows if r["provider"] != "eager" and not str(r["provider"]).startswith("fastvit")]
    return max((r for r in peers if r.get("images_per_s")), key=lambda r: float(str(r["images_per_s"])), default=None)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite README.md, or with --check only say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if rows and table differ")
    given = parser.parse_args(arguments)
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = written(before)
    if given.check and after != before:
        print("README.md: a table is not what benchmarks/results/ says: run `make readme`", file=sys.stderr)
        return 1
    if after != before:
        path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
