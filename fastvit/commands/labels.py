"""What the classes are called: a text file, a JSON file, or the `id2label` of a transformers configuration."""

import json
from pathlib import Path
from typing import Any

from .terminal import UsageError

_MAX_BYTES = 16 * 2**20


def read_labels(path: Path) -> list[str]:
    """The label of every class, from a text file (one a line) or JSON: a list, {"0": label}, or an `id2label` of those.

    Raises:
        UsageError: the file cannot be read, is no such file, or leaves out a class.
    """
    if path.suffix.lower() == ".json":
        found = read_json(path)
        labels = found["id2label"] if isinstance(found, dict) and "id2label" in found else found
    else:
        labels = [line.strip() for line in read_text(path).rstrip().splitlines()]
    return as_labels(labels, path)


def as_labels(found: Any, path: Path) -> list[str]:
    """A list of labels, or a dictionary from "0", "1", ... to labels, as a list."""
    if isinstance(found, dict):
        missing = next((i for i in range(len(found)) if str(i) not in found), None)
        if missing is not None:
            raise UsageError(f"{path}: {len(found)} labels, but none for class {missing}")
        found = [found[str(i)] for i in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise UsageError(f'{path}: expected a list of labels, {{"0": label, ...}} or an id2label of those')
    if not found:
        raise UsageError(f"{path}: no labels")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds; a UsageError says why it cannot be read."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from None


def read_text(path: Path) -> str:
    """A text file in UTF-8, of 16 MiB at most; a UsageError says why it cannot be read."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise UsageError(f"{path}: {size:,} bytes, more than the {_MAX_BYTES:,} allowed")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not text in UTF-8") from None
