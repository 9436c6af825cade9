"""WebDataset shards: tar files in which an image and its label are members of one name, indexed once, read anywhere."""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .decode import decoded_bytes
from .source import DataError, check_labels
from .split import NAMES, stratified

IMAGES = ("jpg", "jpeg", "png", "webp")
CLASS_NAMES = ("classes.txt", "classnames.txt")
_SPLIT = re.compile(r"(?<![a-z])(train|test|val|validation|valid)(?![a-z])")
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Sample:
    """Where an image's bytes lie: its shard, the name and the extent of the member."""

    shard: str
    member: str
    offset: int
    size: int


class Shards:
    """Images inside of tar files by number; each is read by its offset, so that order, resuming and ranks are free."""

    def __init__(self, name: str, classes: list[str], samples: list[Sample], labels: list[int]) -> None:
        self.name, self.classes, self.samples, self.labels = name, classes, samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        where = f"{sample.shard}: {sample.member}"
        try:
            with open(sample.shard, "rb") as file:
                file.seek(sample.offset)
                data = file.read(sample.size)
        except OSError as error:
            raise DataError(f"{where}: {error.strerror}") from None
        return decoded_bytes(data, where), self.labels[index]


def shards(pattern: str, split: str) -> Shards:
    """The samples of the tar files behind a pattern with `{000..009}`, `{a,b}`, `*` and `?`, or in a directory.

    Where the name of the files, or of the folder they lie in, says train, test, val, validation or valid, the split's
    own files are taken: `train-{000..009}.tar` stands for itself and, for the test set, for `test-*.tar` or else
    `val-*.tar`. Where it does not, a fixed fifth of every class is the test set (:func:`split.stratified`).

    A sample's members share the name up to its first dot: an image (.jpg, .jpeg, .png, .webp) and .cls, a number, or
    .json with "label". Classes are named by the lines of classes.txt beside the shards, else by their numbers up to the
    largest label.

    Raises:
        DataError: a shard is missing, no tar file or truncated; a sample has no image or no label, or two of them.
    """
    paths, divided = _paths(pattern, split)
    samples: list[Sample] = []
    labels: list[int] = []
    for path in paths:
        for sample, label in _indexed(path):
            samples.append(sample)
            labels.append(label)
    if not samples:
        raise DataError(f"{pattern}: no samples in {len(paths)} shards (looked for .{', .'.join(IMAGES)} with .cls)")
    classes = _class_names(paths[0].parent) or [str(number) for number in range(max(labels) + 1)]
    check_labels(torch.tensor(labels), len(classes), pattern)
    if not divided:
        names = [f"{Path(sample.shard).name}/{sample.member}" for sample in samples]
        mine = stratified(labels, names, split)
        samples, labels = [samples[n] for n in mine], [labels[n] for n in mine]
    return Shards(paths[0].parent.name, classes, samples, labels)


def _paths(pattern: str, split: str) -> tuple[list[Path], bool]:
    """The shards of a split, and whether their names say that they are; all shards where names say nothing."""
    if Path(pattern).is_dir():
        tars = sorted(Path(pattern).glob("*.tar"))
        if not tars:
            raise DataError(f"{pattern}: no shards in this directory (looked for *.tar)")
        said = [_SPLIT.search(path.name) for path in tars]
        if not any(said):
            return tars, False
        for name in NAMES[split]:
            chosen = [path for path, word in zip(tars, said, strict=True) if word and word.group() == name]
            if chosen:
                return chosen, True
        raise DataError(f"{pattern}: no shards of the {split} set (looked for {', '.join(NAMES[split])} in the names)")
    directory, name = os.path.split(pattern)
    above, folder = os.path.split(directory)
    word = _SPLIT.search(name) or _SPLIT.fullmatch(folder)
    if word is None or word.group() in NAMES[split]:
        return _existing(pattern), word is not None
    tried = []
    for other in NAMES[split]:
        renamed = _BRACES.sub("*", name)  # how many shards the other split has, the range does not say
        if _SPLIT.search(name):
            tried.append(os.path.join(directory, _SPLIT.sub(other, renamed)))
        else:
            tried.append(os.path.join(above, other, renamed))
        if any(glob.glob(one) for one in _expanded(tried[-1])):
            return _existing(tried[-1]), True
    raise DataError(f"{pattern}: no shards of the {split} set (looked for {', '.join(tried)})")


def _existing(pattern: str) -> list[Path]:
    found: list[Path] = []
    for one in _expanded(pattern):
        matched = [one] if os.path.isfile(one) else sorted(glob.glob(one))
        if not matched:
            reason = "no shard matches" if glob.has_magic(one) else "missing shard"
            raise DataError(f"{one}: {reason}" + (f" (of {pattern})" if one != pattern else ""))
        found += map(Path, matched)
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """The names behind a pattern with braces, as a shell makes them."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span is None and "," not in braces[1]:
        raise DataError(f"{pattern}: {braces[0]} is neither a range such as {{000..009}} nor a list such as {{a,b}}")
    if span:
        first, last = int(span[1]), int(span[2])
        width = max(map(len, span.groups())) if any(len(end) > 1 and end[0] == "0" for end in span.groups()) else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        parts: Iterator[str] = (f"{number:0{width}d}" for number in numbers)
    else:
        parts = iter(braces[1].split(","))
    for part in parts:
        yield from _expanded(f"{pattern[: braces.start()]}{part}{pattern[braces.end() :]}")


def _indexed(path: Path) -> list[tuple[Sample, int]]:
    """The samples of a shard and their labels, in the order of their first members."""
    images: dict[str, Sample] = {}
    labels: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, extension = os.path.basename(member.name).partition(".")
                key, extension = os.path.join(os.path.dirname(member.name), stem), extension.lower()
                labels_of = labels.setdefault(key, {})
                if not member.isreg() or member.issparse():
                    continue
                if extension in labels_of or (extension in IMAGES and key in images):
                    raise DataError(f"{path}: {key} has two members of its kind, .{extension} the second")
                if extension in IMAGES:
                    images[key] = Sample(str(path), member.name, member.offset_data, member.size)
                elif extension in ("cls", "json"):
                    file = tar.extractfile(member)
                    label = _label(file.read() if file else b"", extension, f"{path}: {member.name}")
                    if label is not None:
                        labels_of[extension] = label
            end = tar.offset
        with path.open("rb") as raw:
            raw.seek(end)
            # where a header is damaged or cut off, tarfile sees the end of the archive
            if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(
                    f"{path}: truncated or damaged at byte {end}: no end of archive after {len(images)} images"
                )
    except tarfile.TarError as error:
        detail = "truncated: " if "unexpected end" in str(error) else "not an uncompressed tar file, or truncated: "
        raise DataError(f"{path}: {detail}{error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    found = []
    for key, labels_of in labels.items():
        if key in images and not labels_of:
            raise DataError(f"{path}: {images[key].member} has no label (looked for {key}.cls and {key}.json)")
        if key not in images and "cls" in labels_of:
            raise DataError(f"{path}: {key}.cls has no image (looked for .{', .'.join(IMAGES)})")
        if key in images:
            found.append((images[key], labels_of.get("cls", labels_of.get("json", -1))))
    return found


def _label(data: bytes, extension: str, where: str) -> int | None:
    """The number in a .cls, or under "label" in a .json, which need not have one."""
    try:
        value: Any = int(data) if extension == "cls" else json.loads(data)
    except ValueError:
        raise DataError(f"{where}: {data[:40]!r} is no {'number' if extension == 'cls' else 'JSON'}") from None
    if extension == "json":
        value = value.get("label") if isinstance(value, dict) else None
        if value is not None and type(value) is not int:
            raise DataError(f"{where}: the label is {str(value)[:40]!r}, expected the number of a class")
    if value is not None and not 0 <= value < 1 << 31:
        raise DataError(f"{where}: label {value}, expected 0 or more")
    return value


def _class_names(directory: Path) -> list[str]:
    for name in CLASS_NAMES:
        if (directory / name).is_file():
            lines = (directory / name).read_text(encoding="utf-8", errors="replace").splitlines()
            return [line.strip() for line in lines if line.strip()]
    return []
