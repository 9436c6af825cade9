"""CIFAR-10 and CIFAR-100 as their authors distribute them: the python version and the binary version."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .pickled import described, names
from .source import DataError, InMemory, check_labels

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """One of the distributed versions: its folder, its files, where a class is named.

    label: the key of an image's class in the python version, and in the binary one which of its first bytes it is.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label: str | int
    leading: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, self.meta)

    def lies_in(self, folder: Path, least: int) -> bool:
        return sum((folder / name).is_file() for name in self.files) >= least


_FIVE = tuple(f"data_batch_{number}" for number in range(1, 6))
_VERSIONS = {
    "cifar10": (
        _Version("cifar-10-batches-py", _FIVE, ("test_batch",), "batches.meta", "labels"),
        _Version(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _FIVE),
            ("test_batch.bin",),
            "batches.meta.txt",
            0,
            leading=1,
        ),
    ),
    "cifar100": (
        _Version("cifar-100-python", ("train",), ("test",), "meta", "fine_labels"),
        _Version("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 1, leading=2),
    ),
}
_NAMES = {"labels": "label_names", "fine_labels": "fine_label_names"}


def recognised(directory: Path, kind: str, least: int = 1) -> tuple[Path, _Version] | None:
    """The folder with at least so many files of a version of `kind`, `directory` or one in it, and which version."""
    for version in _VERSIONS[kind]:
        for folder in (directory, directory / version.folder):
            if version.lies_in(folder, least):
                return folder, version
    return None


def cifar(directory: str | Path, split: str, kind: str = "cifar10") -> InMemory:
    """CIFAR from the directory that holds its files or from the one above; how many images there are is up to them.

    Args:
        kind: "cifar10", or "cifar100" with its fine labels.

    Raises:
        DataError: a file is missing, truncated or empty, a label has no name, a pickle holds more than CIFAR's does.
    """
    found = recognised(Path(directory), kind)
    if found is None:
        wanted = "; ".join(f"{v.folder}: {v.train[0]}, {v.test[0]}, {v.meta}" for v in _VERSIONS[kind])
        raise DataError(f"{directory}: no {kind} here (looked in it and in the folders for {wanted})")
    folder, version = found
    files = version.train if split == "train" else version.test
    missing = [name for name in (*files, version.meta) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} missing (a {split} set of {kind} is {', '.join(files)})")
    classes = _class_names(folder / version.meta, version)
    parts = [_read(folder / name, version, len(classes)) for name in files]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return InMemory(kind, classes, torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels))


def _class_names(path: Path, version: _Version) -> list[str]:
    if isinstance(version.label, str):
        key = _NAMES[version.label]
        return names(described(path).get(key), path, key)
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if not any(lines):
        raise DataError(f"{path}: the file is empty, expected a class name on each line")
    return [line for line in lines if line]


def _read(path: Path, version: _Version, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, uint8 (N, 3072), and the classes, int64 (N,), of one file."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    pixels, labels = _binary(path, version) if isinstance(version.label, int) else _python(path, version.label)
    check_labels(torch.from_numpy(labels), classes, path)
    return pixels, labels


def _python(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    batch = described(path)
    data, labels = batch.get("data"), batch.get(key)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != PIXELS or not len(data):
        shape = data.shape if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: 'data' is {shape}, expected uint8 (N, {PIXELS}) with N > 0")
    if not isinstance(labels, list) or len(labels) != len(data):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise DataError(f"{path}: {count} {key!r} for {len(data)} images")
    wrong = next((label for label in labels if type(label) is not int or abs(label) > 1 << 31), None)
    if wrong is not None:
        raise DataError(f"{path}: {key!r} holds {str(wrong)[:40]!r}, expected numbers of classes")
    return np.ascontiguousarray(data), np.array(labels, dtype=np.int64)


def _binary(path: Path, version: _Version) -> tuple[np.ndarray, np.ndarray]:
    record, size = version.leading + PIXELS, path.stat().st_size
    if size % record:
        raise DataError(
            f"{path}: {size} bytes, expected a multiple of {record} ({version.leading} of labels and {PIXELS} pixels "
            "per image): the file is truncated or of another version"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    column = version.label
    assert isinstance(column, int)
    return np.ascontiguousarray(records[:, version.leading :]), records[:, column].astype(np.int64)
