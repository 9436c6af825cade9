"""Data sets of Hugging Face's `datasets`: saved to disk, folders of images or parquet files, or names in its cache."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decode import decoded, decoded_bytes
from .source import DataError, check_labels
from .split import NAMES, stratified

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")


class HuggingFace:
    """Rows of a data set whose images are kept encoded until they are asked for."""

    def __init__(self, name: str, classes: list[str], rows: Any, image: str, labels: list[int]) -> None:
        self.name, self.classes, self.rows, self.image, self.labels = name, classes, rows, image, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        cell = self.rows[index][self.image]
        if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
            raise DataError(f"{self.name}: row {index} has no image in {self.image!r}")
        if cell.get("bytes"):
            return decoded_bytes(cell["bytes"], f"{self.name}: row {index}"), self.labels[index]
        return decoded(Path(cell["path"])), self.labels[index]


def saved_to_disk(directory: Path) -> bool:
    """Whether `save_to_disk` of a data set or of a dictionary of them wrote this directory."""
    return any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))


def hugging_face(place: str, split: str) -> HuggingFace:
    """A data set by its name or directory; a fixed fifth of every class is the test set of one that has one part.

    Images are in the column image or img, classes in label, labels or fine_label: a ClassLabel, or whole numbers.

    Raises:
        ImportError: `datasets` is not installed.
        DataError: it cannot load the place, has no such split or column, or an image has no class.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as missing:
        raise ImportError(
            f"fastvit.data: hf:{place} needs Hugging Face datasets ({missing}); install it with: pip install datasets",
            name=missing.name,
        ) from None
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(place) if saved_to_disk(Path(place)) else datasets.load_dataset(place)
    except Exception as error:  # of a dozen kinds, from its own to those of the network
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"hf:{place}: {detail[:300]}") from None
    finally:
        if not silent:
            datasets.enable_progress_bars()
    parts: dict[str, Any] = dict(found) if isinstance(found, dict) else {"train": found}
    whole = list(parts) == ["train"]  # what `datasets` calls everything that nobody has divided
    name = "train" if whole else next((name for name in NAMES[split] if name in parts), None)
    if name is None:
        raise DataError(f"hf:{place}: no {split} set (looked for {', '.join(NAMES[split])}; found {', '.join(parts)})")
    rows = parts[name]
    image, label = (_column(rows, names, place) for names in (IMAGES, LABELS))
    if not isinstance(rows.features[image], datasets.Image):
        raise DataError(f"hf:{place}: column {image!r} is {rows.features[image]}, expected Image")
    classes, labels = _labels(rows, label, f"hf:{place}")
    rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    if whole:
        mine = stratified(labels, [str(number) for number in range(len(labels))], split)
        rows, labels = rows.select(mine), [labels[number] for number in mine]
    return HuggingFace(Path(place).name, classes, rows, image, labels)


def _column(rows: Any, names: tuple[str, ...], place: str) -> str:
    found = next((name for name in names if name in rows.features), None)
    if found is None:
        raise DataError(f"hf:{place}: no column {' or '.join(names)} (found {', '.join(rows.features)})")
    return found


def _labels(rows: Any, column: str, where: str) -> tuple[list[str], list[int]]:
    """The classes' names, and the class of each row."""
    values = np.asarray(rows.with_format("numpy")[column][:])
    if not len(values) or values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataError(f"{where}: column {column!r} is {rows.features[column]}, expected the number of a class")
    named = getattr(rows.features[column], "names", None)
    classes = list(named) if named else [str(number) for number in range(int(values.max()) + 1)]
    check_labels(torch.from_numpy(values.astype(np.int64)), len(classes), where)
    return classes, values.tolist()
