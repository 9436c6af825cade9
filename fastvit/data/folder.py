"""Image folders: a folder for each class, in folders for training and test or without them."""

import os
from pathlib import Path

from torch import Tensor

from fastvit.images import SUFFIXES

from .decode import decoded
from .source import DataError
from .split import NAMES, stratified


class Folder:
    """Image files, each with the class of the folder it lies in."""

    def __init__(self, name: str, classes: list[str], files: list[str], labels: list[int]) -> None:
        self.name, self.classes, self.files, self.labels = name, classes, files, labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decoded(Path(self.files[index])), self.labels[index]


def folder(directory: str | Path, split: str) -> Folder:
    """DIR/train/<class>/... and DIR/test/<class>/... (or val, validation, valid); or DIR/<class>/..., divided.

    The classes are the folders of the training set in the order of their names; images may lie deeper in them. Without
    folders for training and test, a fixed fifth of every class is the test set (:func:`split.stratified`).

    Raises:
        DataError: no such directory, no folder for the split, a class without images, a class that training lacks.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory of images")
    parts = {name: root / name for names in NAMES.values() for name in names if _inside(root / name)}
    if not parts:
        classes, files, labels = _read(root, _inside(root))
        mine = stratified(labels, [Path(file).relative_to(root).as_posix() for file in files], split)
        return Folder(root.name, classes, [files[n] for n in mine], [labels[n] for n in mine])
    chosen = next((parts[name] for name in NAMES[split] if name in parts), None)
    if chosen is None:
        wanted = ", ".join(f"{name}/<class>" for name in NAMES[split])
        raise DataError(f"{root}: no {split} set (looked for {wanted}; found {', '.join(parts)})")
    classes = _inside(parts.get("train", chosen))
    unknown = sorted({*_inside(chosen)} - {*classes})
    if unknown:
        raise DataError(f"{chosen / unknown[0]}: a class that {parts['train']} lacks")
    return Folder(root.name, *_read(chosen, classes))


def _inside(directory: Path) -> list[str]:
    """The folders in a folder by name, hidden ones left out; none where there is no such folder."""
    if not directory.is_dir():
        return []
    try:
        return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(f"{directory}: {error.strerror}") from None


def _read(root: Path, classes: list[str]) -> tuple[list[str], list[str], list[int]]:
    """The classes, the image files of all of them in order, and the class of each; a class may be absent, not empty."""
    files: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        of_class = sorted(
            os.path.join(where, file)
            for where, _, inside in os.walk(root / name)
            for file in inside
            if file.lower().endswith(SUFFIXES) and file[0] != "."
        )
        if not of_class and (root / name).is_dir():
            raise DataError(f"{root / name}: a class without images (looked for *{', *'.join(SUFFIXES)})")
        files += of_class
        labels += [number] * len(of_class)
    if not files:
        raise DataError(f"{root}: no folders of images in it, one for each class")
    return classes, files, labels
