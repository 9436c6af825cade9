"""Benchmark rows: a tidy CSV with a unique key, appended to or replaced by key, never left half-written."""

import csv
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

KEY = ("case", "shape", "dtype", "direction", "provider", "device")
COLUMNS = (
    *KEY,
    "status",
    "level",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "repeats",
    "call_ms",
    "images_per_s",
    "gflops",
    "gbs",
    "ratio",
    "max_error",
    "relative_error",
    "error_ratio",
    "top1_agreement",
    "peak_mib",
    "flops",
    "bytes",
    "ceiling_gflops",
    "ceiling_gbs",
    "ceiling_share",
    "eager",
    "images",
    "note",
    "date",
    "threads",
    "fastvit",
    "torch",
    "triton",
    "timm",
    "python",
    "commit",
)

# What a row is about, in its column "level": a whole model (also where the column is empty) or one op.
MODEL, OP = "", "op"

Row = Mapping[str, object]


class RowError(ValueError):
    """The file is no table of benchmark rows."""


def key(row: Row) -> tuple[str, ...]:
    """The values that make a row unique."""
    return tuple(_cell(row[column]) for column in KEY)


R = TypeVar("R", bound=Row)


def of_level(rows: Iterable[R], level: str) -> list[R]:
    """The rows about whole models, or about ops."""
    return [row for row in rows if (row.get("level") or MODEL) == level]


def path_of(folder: str | Path, device: str) -> Path:
    """Where a folder of results keeps a device's rows: "AMD EPYC, 2 threads" -> amd-epyc-2-threads.csv."""
    return Path(folder) / f"{stem(device)}.csv"


def stem(device: str) -> str:
    """A device's name as files are called: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"


def read_folder(folder: str | Path) -> list[dict[str, str]]:
    """All rows of a folder of results, file by file; other tables may lie beside them."""
    return [row for path in sorted(Path(folder).glob("*.csv")) if _holds_rows(path) for row in read(path)]


def _holds_rows(path: Path) -> bool:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return set(KEY) <= set(next(csv.reader(file), ()))


def is_ours(provider: object) -> bool:
    """Whether a provider is fastvit, with whichever backend or library's model."""
    return str(provider).split("-")[0] == "fastvit"


def read(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file; a file that does not exist has none.

    Raises:
        RowError: it exists and lacks one of the key columns, or is no text.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restkey="_surplus")
            names = reader.fieldnames or []
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise RowError(f"{path}: no CSV table of benchmark rows ({error})") from None
    missing = [column for column in KEY if column not in names]
    if missing and (names or rows):
        raise RowError(f"{path}: no table of benchmark rows, its header lacks {', '.join(missing)}")
    for number, row in enumerate(rows, start=2):
        if "_surplus" in row or None in row.values():
            raise RowError(f"{path}: row {number} has another number of cells than the header")
    return rows


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Replace rows of equal key in place and append the others, in order."""
    merged = {key(row): row for row in old}
    merged.update({key(row): row for row in new})
    return list(merged.values())


def write(path: str | Path, new: Iterable[Row]) -> int:
    """Merge rows into a CSV file and return how many it then holds.

    The table is written beside the file and renamed over it: a reader, or a run that is interrupted, sees the old
    table or the new one. Columns this version does not know are kept.

    Raises:
        RowError: the file exists and is no table of benchmark rows.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = merge(read(path), new)
    foreign = dict.fromkeys(column for row in rows for column in row if column not in COLUMNS)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, (*COLUMNS, *foreign), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({column: _cell(value) for column, value in row.items()} for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return len(rows)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
