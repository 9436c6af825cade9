"""PNG pictures and a report from benchmark rows: `python -m fastvit.benchmarks.plot FOLDER_OR_CSV [-o FOLDER]`.

For each device STEM-summary.png, -models, -ops, -roofline, -growth and -memory, those for which there are rows, and
report.html for all devices. Each file carries a digest of the rows it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastvit.figures import check_target, save

from . import charts, report, rows as rows_module
from .pictures import PICTURES, text
from .standings import devices, order

Row = Mapping[str, object]

DPI = 128
KEYWORD = "Rows"  # of the text chunk in a PNG that holds the digest


class PlotError(ValueError):
    """There is nothing to draw."""


def draw_all(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw every picture that the rows allow and write the report, each file in one step.

    Returns:
        The files: the pictures device by device, the report last.

    Raises:
        PlotError: no rows. FigureError: matplotlib is missing, or the folder cannot be written.
    """
    folder = Path(folder)
    check_target(folder / "picture.png")
    if not rows:
        raise PlotError("no rows to draw")
    written = []
    with charts.style():
        for device, group in devices(rows).items():
            for name, picture in PICTURES.items():
                if panels := picture.drawn(group):
                    marked = {KEYWORD: digest(picture.source(group))}
                    written.append(save(picture.page(group, panels), folder / file_name(device, name), DPI, marked))
    return [*written, report.write(rows, folder, digest(report_source(rows)))]


def report_source(rows: Iterable[Row]) -> list[dict[str, str]]:
    """All that the report is made from: every known column of every row."""
    cells = ({column: text(row.get(column)) for column in rows_module.COLUMNS} for row in rows)
    return sorted(cells, key=order)


def stale(rows: Sequence[Row], folder: str | Path) -> list[str]:
    """What in a folder is not what its rows say, a sentence each: pictures and the report, missing, old or orphaned."""
    folder = Path(folder)
    wanted = {}
    for device, group in devices(rows).items():
        for name, picture in PICTURES.items():
            if picture.drawn(group):
                wanted[file_name(device, name)] = digest(picture.source(group))
    if rows:
        wanted[report.NAME] = digest(report_source(rows))
    wrong = []
    for name, expected in wanted.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif drawn_from(path) != expected:
            wrong.append(f"{name} was drawn from other rows")
    ours = [path.name for name in PICTURES for path in sorted(folder.glob(f"*-{name}.png"))]
    return wrong + [f"{name} has no rows" for name in ours if name not in wanted]


def drawn_from(path: str | Path) -> str | None:
    """The digest that a picture or a report carries, None if it has none."""
    data = Path(path).read_bytes()
    if Path(path).suffix == ".html":
        found = re.search(rf'<meta name="{report.DIGEST}" content="(\w*)">', data.decode("utf-8", "replace"))
        return found[1] if found else None
    return _text_chunks(data).get(KEYWORD)


def _text_chunks(data: bytes) -> dict[str, str]:
    """The tEXt chunks of a PNG; none of what is no PNG. Source: PNG specification, 5.3 and 11.3.4.3."""
    found, place = {}, 8
    while data[:8] == b"\x89PNG\r\n\x1a\n" and place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"tEXt":
            keyword, _, said = data[place + 8 : place + 8 + length].partition(b"\0")
            found[keyword.decode("latin-1")] = said.decode("latin-1")
        place += length + 12
    return found


def file_name(device: str, name: str) -> str:
    """What a device's picture is called."""
    return f"{rows_module.stem(device)}-{name}.png"


def digest(rows: Iterable[Row]) -> str:
    """SHA-256 over rows and columns, in hexadecimal; the order of the columns has no say."""
    text = json.dumps([dict(row) for row in rows], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read rows, draw them, print the files; 0 on success."""
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.plot", description=__doc__)
    parser.add_argument("rows", type=Path, help="a folder of results, or one CSV file of rows")
    parser.add_argument("-o", "--output", type=Path, help="folder to write to (default: where the rows lie)")
    given = parser.parse_args(arguments)
    is_folder = given.rows.is_dir()
    try:
        if not given.rows.exists():
            raise PlotError(f"{given.rows}: no such file or folder")
        rows = rows_module.read_folder(given.rows) if is_folder else rows_module.read(given.rows)
        for path in draw_all(rows, given.output or (given.rows if is_folder else given.rows.parent)):
            print(path)
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
