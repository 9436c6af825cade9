"""Features as a parquet data set in parts: each is whole or absent, and a manifest says what all of them are made of.

The folder is one data set for pandas, pyarrow, Polars, DuckDB and Spark, which pass by what begins with "_" or ".":

    features.parquet/part-00000.parquet ...     path: string, feature: fixed_size_list<float>[D]
    features.parquet/_unreadable/part-00000.csv the images of that part that have no features, and why
    features.parquet/_manifest.json             model, options, images: a run adds only what is made of the same
"""

import csv
import hashlib
import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "_manifest.json"
UNREADABLE = "_unreadable"


def check_folder(folder: Path) -> None:
    """Check before any work that parts can be written there.

    Raises:
        UsageError: pyarrow is missing, it is a file, holds something else, or cannot be written to.
    """
    from fastvit import figures

    from .terminal import as_usage_errors

    try:
        _pyarrow()
    except ImportError:
        raise UsageError('parquet files need pyarrow:  pip install "fastvit[embed]"') from None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file, not a folder for parquet files")
    with as_usage_errors(figures.FigureError):
        figures.check_folder(folder)
    if folder.is_dir() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: holds other files, and no {MANIFEST}; give another --output")


def digest_of_names(names: Iterable[str]) -> str:
    """SHA-256 of a list of names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def digest_of_weights(checkpoint: Path | None) -> str:
    """SHA-256 of a checkpoint's file, or of the files in its directory that make the model."""
    if checkpoint is None:
        return "random weights"
    files = [checkpoint]
    if checkpoint.is_dir():
        files = sorted(path for path in checkpoint.iterdir() if path.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def start(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or check that the folder's own says the same; take away what a killed run left half done.

    Raises:
        UsageError: the parts in the folder were made of something else, and what it was.
    """
    from fastvit.figures import in_one_step

    path = folder / MANIFEST
    if path.exists():
        _check_same(path, manifest)
        for half in folder.glob(".part-*"):
            half.unlink(missing_ok=True)
        return
    with in_one_step(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Parts:
    """The parts of a folder: ``images`` in all, ``size`` in each, D numbers of ``dtype`` for each image."""

    folder: Path
    images: int
    size: int
    width: int
    dtype: str

    def __len__(self) -> int:
        return math.ceil(self.images / self.size)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.parquet"

    def indices(self, part: int) -> range:
        """Which images are in a part."""
        return range(part * self.size, min(self.images, (part + 1) * self.size))

    def write(self, part: int, names: Sequence[str], features: "Tensor", unreadable: Sequence[tuple[str, str]]) -> None:
        """One part: names and features (n, D) of its images, and the names of the others with the reason."""
        from fastvit.figures import in_one_step

        pyarrow = _pyarrow()
        flat = pyarrow.array(features.contiguous().view(-1).numpy())
        rows = pyarrow.table(
            {
                "path": pyarrow.array([_text(name) for name in names], pyarrow.string()),
                "feature": pyarrow.FixedSizeListArray.from_arrays(flat, self.width),
            }
        )
        reasons = self.folder / UNREADABLE / f"part-{part:05d}.csv"
        if unreadable:
            with in_one_step(reasons) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                listed = [(_text(name), _text(why.removeprefix(f"{name}: "))) for name, why in unreadable]
                csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *listed])
        else:
            reasons.unlink(missing_ok=True)  # of a run that was killed before the part was whole
        with in_one_step(self.path(part)) as temporary, open(temporary, "wb") as file:
            pyarrow.parquet.write_table(rows, file)
            file.flush()
            os.fsync(file.fileno())  # the name must not outlive the machine without its contents

    def unreadable(self, part: int) -> int:
        """How many images of a finished part have no features."""
        return len(self.indices(part)) - _pyarrow().parquet.read_metadata(self.path(part)).num_rows


def _pyarrow() -> Any:
    """pyarrow and its parquet module: an optional dependency, and one without types."""
    importlib.import_module("pyarrow.parquet")
    return importlib.import_module("pyarrow")


def _text(name: str) -> str:
    """A name as UTF-8, the bytes that are none written out."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _check_same(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: not a manifest of features")
    # through JSON, so that tuples are lists on both sides
    wanted = json.loads(json.dumps(manifest))
    other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if other:
        name = other[0]
        was, now = (json.dumps(one.get(name)) for one in (found, wanted))
        raise UsageError(f"{path.parent}: made with {name} {was}, and now it is {now}; give another --output")
