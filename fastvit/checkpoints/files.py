"""Checkpoint files, headers first: every name, dtype, shape and size is checked before a byte of data is read.

A format is an iterator of :class:`Entry` over a file of known size. Nothing here runs code that a file brings along,
and no allocation is larger than what the file itself holds.
"""

import ctypes
import functools
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .error import CheckpointError, shortened

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")
PICKLED = (".pt", ".pth", ".bin")
MOST_HEADER = 16 << 20  # bytes: 100,000 tensors; the header of a ViT-g has 100 kB
MOST_TENSORS = 100_000
MOST_READ = 1 << 20  # bytes at a time: an archive unpacks them in memory of its own
SINGLE = ("model.safetensors", "model.safetensors.index.json")
SINGLE_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: what its header says, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """An open checkpoint: entries by name, the file's own notes, and the settings that lie beside it."""

    path: Path
    entries: Mapping[str, Entry]
    kind: str
    config: Mapping[str, Any] | None = None

    def headers(self) -> dict[str, Tensor]:
        """Meta tensors in the place of the file's."""
        return {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in self.entries.values()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, on the CPU.

        Raises:
            CheckpointError: the data cannot be read, or is not what the header promised.
        """
        found = {}
        for name in names:
            try:
                found[name] = self.entries[name].read()
            except CheckpointError:
                raise
            except Exception as error:
                raise CheckpointError(f"fastvit: {self.path}: {name!r} cannot be read: {error}") from error
        return found


def open_checkpoint(path: str | os.PathLike[str], weights_only: bool | None = None) -> Source:
    """The headers of a checkpoint: a file, or a directory as transformers writes one.

    Args:
        path: ``.safetensors``, ``.npz``, or with ``weights_only=True`` a ``.pt``, ``.pth`` or ``.bin`` of torch.save.

    Raises:
        FileNotFoundError: nothing of that name; CheckpointError: a file that is none of these, or that is damaged.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"fastvit: path must be a path, got {type(path).__name__}")
    if weights_only not in (None, True):
        raise ValueError(f"fastvit: weights_only must be True or left out, got {weights_only!r}: no pickle runs here")
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"fastvit: {place}: no such file or directory, and nothing is downloaded here")
    try:
        chosen = _inside(place, weights_only) if place.is_dir() else place
        config = _config_beside(chosen)
        if chosen.name.endswith(".index.json"):
            return Source(place, _unique(_shards(chosen, weights_only), place), "shards", config)
        return Source(place, _unique(_entries(chosen, weights_only), place), chosen.suffix, config)
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CheckpointError(f"fastvit: {place} cannot be read as a checkpoint: {reason}") from error


def _inside(folder: Path, weights_only: bool | None) -> Path:
    for name in (*SINGLE, *(SINGLE_PICKLED if weights_only else ())):
        if (folder / name).is_file():
            return folder / name
    pickled = [name for name in SINGLE_PICKLED if (folder / name).is_file()]
    hint = f"; {pickled[0]} is a pickle and needs weights_only=True" if pickled else ""
    raise CheckpointError(f"fastvit: {folder} is a directory without {' or '.join(SINGLE)}{hint}")


def _config_beside(path: Path) -> Mapping[str, Any] | None:
    """transformers' config.json, if there is one that can be read; no weight depends on it."""
    place = path.parent / "config.json"
    try:
        if not place.is_file() or place.stat().st_size > MOST_HEADER:
            return None
        found = json.loads(place.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _entries(path: Path, weights_only: bool | None) -> Iterable[Entry]:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"fastvit: {path} is no regular file")
    if status.st_size == 0:
        raise CheckpointError(f"fastvit: {path} is empty")
    if path.suffix == ".safetensors":
        return _safetensors(path, status.st_size)
    if path.suffix == ".npz":
        from .npz import entries

        return entries(path, status.st_size)
    if path.suffix not in PICKLED:
        raise CheckpointError(f"fastvit: {path.name!r} must end in one of {', '.join(SUFFIXES)}")
    if weights_only is None:
        raise CheckpointError(
            f"fastvit: {path} is a pickle; weights_only=True reads the weights alone and runs no code in it, "
            "a .safetensors file needs no such word"
        )
    from .pickled import entries

    return entries(path, status.st_size)


def _unique(entries: Iterable[Entry], path: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in found:
            raise CheckpointError(f"fastvit: {path} has two tensors named {entry.name!r}")
        if len(found) == MOST_TENSORS:
            raise CheckpointError(f"fastvit: {path} has more than {MOST_TENSORS} tensors")
        found[entry.name] = entry
    if not found:
        raise CheckpointError(f"fastvit: {path} holds no tensor")
    return found


def checked_shape(shape: Any, name: str) -> tuple[int, ...]:
    """A shape of a header as a tuple.

    Raises:
        CheckpointError: not a short list of sizes.
    """
    if not isinstance(shape, (list, tuple)) or len(shape) > 8 or any(type(s) is not int for s in shape):
        raise CheckpointError(f"fastvit: {name!r} has a shape that is no list of at most 8 sizes")
    if any(not 0 <= size < 1 << 50 for size in shape) or math.prod(shape) >= 1 << 60:
        raise CheckpointError(f"fastvit: {name!r} claims shape {tuple(shape)}")
    return tuple(shape)


def json_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object whose names are unique.

    Raises:
        CheckpointError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"fastvit: {what} has {twice[:80]!r} twice")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"fastvit: {what} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"fastvit: {what} must be a JSON object, got {type(found).__name__}")
    return found


def _safetensors(path: Path, size: int) -> Iterable[Entry]:
    """The safetensors format: length of the header (8 bytes), JSON, data without holes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > MOST_HEADER:
            raise CheckpointError(f"fastvit: {path} is no safetensors file: a header of {length} bytes in {size}")
        header = json_object(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    start, end, found = 8 + length, 0, []
    for name, facts in header.items():
        if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"fastvit: {path}: {name!r} must have dtype, shape and data_offsets")
        if not isinstance(facts["dtype"], str) or facts["dtype"] not in DTYPES:
            raise CheckpointError(f"fastvit: {path}: {name!r} has a dtype that is none of {', '.join(DTYPES)}")
        shape, offsets = checked_shape(facts["shape"], name), checked_shape(facts["data_offsets"], name)
        dtype = DTYPES[facts["dtype"]]
        needs = math.prod(shape) * dtype.itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != needs or start + offsets[1] > size:
            raise CheckpointError(
                f"fastvit: {path}: {name!r} {shape} needs {needs} bytes, has {offsets} of {size - start}"
            )
        found.append((offsets[0], offsets[1], name, shape, dtype))
    for begin, stop, name, _, _ in sorted(found):
        if begin != end:
            raise CheckpointError(f"fastvit: {path}: {name!r} begins at {begin}, the data before it ends at {end}")
        end = stop
    if start + end != size:
        raise CheckpointError(f"fastvit: {path} has {size - start - end} bytes behind its last tensor")
    mapped = functools.cache(functools.partial(_mapped, path, size))
    return [
        Entry(name, shape, dtype, _slice(mapped, start + begin, stop - begin, shape, dtype))
        for begin, stop, name, shape, dtype in found
    ]


def _slice(
    mapped: Callable[[], Tensor], start: int, size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        data = mapped()[start : start + size]
        aligned = data if start % dtype.itemsize == 0 else data.clone()
        return aligned.view(dtype).view(shape)

    return read


def _mapped(path: Path, size: int) -> Tensor:
    """The bytes of a file, mapped: what is not looked at is not read, and nothing is copied."""
    if path.stat().st_size != size:
        raise CheckpointError(f"fastvit: {path} had {size} bytes and now has {path.stat().st_size}")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def filled(file: IO[bytes], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor of the little-endian bytes that come next in a file, read into its memory without a copy between.

    Raises:
        CheckpointError: the file ends before.
    """
    tensor = torch.empty(shape, dtype=dtype)
    size, done = tensor.numel() * dtype.itemsize, 0
    memory = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b"").cast("B")
    while done < size:
        count = file.readinto(memory[done : done + MOST_READ])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"fastvit: {size} bytes expected, the file has {done}")
        done += count
    return tensor


def _shards(index: Path, weights_only: bool | None) -> Iterable[Entry]:
    """The files of an index, each name in the file that the index says."""
    if index.stat().st_size > MOST_HEADER:
        raise CheckpointError(f"fastvit: {index} is larger than {MOST_HEADER} bytes")
    places = json_object(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"fastvit: {index} must have a weight_map of names to files")
    for name in sorted(set(places.values())):
        if name != Path(name).name or Path(name).suffix not in SUFFIXES:
            raise CheckpointError(f"fastvit: {index} names {name[:80]!r}, which is no checkpoint beside it")
        expected = {tensor for tensor, place in places.items() if place == name}
        entries = list(_entries(index.parent / name, weights_only))
        missing = expected - {entry.name for entry in entries}
        if missing:
            raise CheckpointError(f"fastvit: {name} lacks {shortened(sorted(missing))}, sought there by {index.name}")
        yield from (entry for entry in entries if entry.name in expected)
