"""A run's checkpoints: directories that are complete or absent, checked before they are trusted."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .error import TrainingError

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A directory ``step-000400`` that was found whole: its facts are those of its state.json."""

    folder: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.facts["step"])


def folders(run: Path) -> list[Path]:
    """The directories of a run's checkpoints, oldest first, whole or not."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole; a damaged one is left out with a warning.

    Raises:
        TrainingError: there are checkpoints, and all of them are damaged.
    """
    reasons = []
    for folder in reversed(folders(run)):
        try:
            found = opened(folder)
        except TrainingError as error:
            reasons.append(str(error).removeprefix("fastvit: "))
            continue
        for reason in reasons:
            warnings.warn(f"fastvit: {reason}; going on from {folder.name}", stacklevel=2)
        return found
    if reasons:
        raise TrainingError(f"fastvit: no checkpoint is whole: {'; '.join(reasons)}")
    return None


def opened(folder: Path) -> Checkpoint:
    """A checkpoint whose files are what was written.

    Raises:
        TrainingError: it is damaged, or none.
    """
    try:
        facts = json.loads((folder / STATE).read_text("utf-8"))
        _check(folder, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"fastvit: {folder} is damaged ({_reason(error)})") from None
    return Checkpoint(folder, facts)


def _check(folder: Path, facts: dict[str, Any]) -> None:
    int(facts["step"])
    for name, told in facts["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if _digest(folder / name) != told:
            raise ValueError(f"{name} is not what was written")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
        return found.hexdigest()


def save(run: Path, step: int, facts: dict[str, Any], write: Callable[[Path], None], keep: int, parallel: Any) -> Path:
    """Write the checkpoint of a step, and remove all but the newest ``keep``.

    It is written beside its place, forced to the disk, then renamed: whatever happens, a directory of that name is
    whole and the checkpoints of before are as they were.

    Args:
        facts: for state.json, which gets the step and every file's SHA-256 as well.
        write: fills a folder that is there; every process calls it.
        parallel: this process's :class:`fastvit.training.parallel.Parallel`; the main one makes and renames folders.

    Raises:
        TrainingError: it could not be written, and why; what was there is left.
    """
    place = run / "checkpoints" / f"step-{step:06d}"
    draft = place.with_name(f".{place.name}.part")
    if place.exists():
        return place
    with _told(place, draft, parallel):
        if parallel.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        parallel.barrier()
        write(draft)
        parallel.barrier()
        if parallel.is_main:
            _finish(draft, place, {"step": step, **facts})
            for old in folders(run)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    parallel.barrier()
    return place


@contextmanager
def _told(place: Path, draft: Path, parallel: Any) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if parallel.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        left = [p.name for p in folders(place.parent.parent)]
        kept = f"{left[-1]} is the newest that is whole" if left else "there is none before it"
        raise TrainingError(f"fastvit: the checkpoint {place} cannot be written: {_reason(error)}; {kept}") from error


def _finish(draft: Path, place: Path, facts: dict[str, Any]) -> None:
    """state.json last, all of it on the disk, then the name."""
    written = sorted(p for p in draft.rglob("*") if p.is_file())
    facts["files"] = {str(p.relative_to(draft)): _digest(p) for p in written}
    (draft / STATE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    for path in (*draft.rglob("*"), draft):
        synced(path)
    os.replace(draft, place)
    synced(place.parent)


def synced(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors on the CPU as a ``.safetensors`` file."""
    safetensors_torch().save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt", **(metadata or {})}
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, on the CPU."""
    return safetensors_torch().load_file(path)


def safetensors_torch() -> Any:
    """The library, which only training needs.

    Raises:
        ImportError: it is not installed, and how to install it.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            'fastvit.training: checkpoints need safetensors; install it with:  pip install "fastvit[train]"'
        ) from None
    return safetensors.torch


def write_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as a file that is whole or what it was before.

    Raises:
        TrainingError: it could not be written, and why.
    """
    draft = path.with_name(f".{path.name}.part")
    try:
        write_tensors(draft, tensors)
        synced(draft)
        os.replace(draft, path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        raise TrainingError(f"fastvit: {path} cannot be written: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.removeprefix("fastvit: ")
