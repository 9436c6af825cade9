"""What a run leaves for people: log.csv, a row for each step, and TensorBoard's events on request."""

import contextlib
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .error import TrainingError

COLUMNS = (
    "step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "seconds", "test_loss", "top1", "top5"
)  # fmt: skip
Row = dict[str, float | int]


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, empty cells left out; a last row that was cut off by a kill is, too."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            try:
                rows.append({name: float(cell) for name, cell in cells.items() if name and cell})
            except (TypeError, ValueError):
                break
    return rows


class Log:
    """log.csv of a run, gone on after the step of the checkpoint that is resumed; later rows are computed again.

    Args:
        run: the run's directory.
        after: the last step whose row stays.
        tensorboard: write events into ``run / "tensorboard"`` as well.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Path, after: int = 0, tensorboard: bool = False) -> None:
        self._path = path = run / "log.csv"
        self._events = _writer(run / "tensorboard", after) if tensorboard else None
        old = [row for row in _lines(path) if row[:1] and row[0].isdecimal() and int(row[0]) <= after]
        draft = path.with_name(f".{path.name}.part")
        with open(draft, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(row for row in old if len(row) == len(COLUMNS))])
        draft.replace(path)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._csv = csv.writer(self._file)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of finished steps, visible to readers at once.

        Raises:
            TrainingError: they cannot be written, and why.
        """
        try:
            self._write(rows)
        except OSError as error:
            raise TrainingError(f"fastvit: {self._path} cannot be written: {error.strerror or error}") from error

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self._csv.writerow([_cell(row.get(column)) for column in COLUMNS])
            if self._events is not None:
                for name, value in row.items():
                    if name not in ("step", "seconds"):
                        self._events.add_scalar(name, value, row["step"])
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take was told by write
            self._file.close()
        if self._events is not None:
            self._events.close()


def _lines(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _cell(value: Any) -> str:
    """A float's shortest digits that give it back."""
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _writer(folder: Path, after: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError('fastvit.training: TensorBoard is not installed:  pip install "fastvit[train]"') from None
    return SummaryWriter(str(folder), purge_step=after + 1)
