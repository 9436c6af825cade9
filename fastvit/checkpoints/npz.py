"""NumPy's .npz without NumPy: a zip of arrays, each with a header that is one short line of literals."""

import ast
import functools
import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .error import CheckpointError
from .files import Entry, checked_shape, filled

MOST_LINE = 4096
# compressed weights are hardly smaller than the weights; a bomb is a thousand times
MOST_GROWTH, ALWAYS_FINE = 100, 64 << 20

# |V2 is what NumPy makes of a bfloat16 that it does not know
DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "|V2": torch.bfloat16,
    "<V2": torch.bfloat16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<i2": torch.int16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}


def open_zip(path: Path, size: int) -> zipfile.ZipFile:
    """A zip archive whose parts have names of their own, are not encrypted and do not unpack to a multiple.

    Raises:
        CheckpointError: anything else.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"fastvit: {path} is no zip archive, or a truncated one: {error}") from None
    parts = archive.infolist()
    names = [part.filename for part in parts]
    total = sum(part.file_size for part in parts)
    reason = None
    if len(set(names)) != len(names):
        reason = f"two parts named {next(name for name in names if names.count(name) > 1)[:80]!r}"
    elif any(part.flag_bits & 1 for part in parts):
        reason = "encrypted parts"
    elif total > max(MOST_GROWTH * size, ALWAYS_FINE):
        reason = f"parts of {total} bytes packed into {size}"
    if reason:
        archive.close()
        raise CheckpointError(f"fastvit: {path} has {reason}")
    return archive


def entries(path: Path, size: int) -> Iterable[Entry]:
    """The arrays of an .npz file.

    Raises:
        CheckpointError: an array of objects, of a dtype no tensor has, or that claims another size than it has.
    """
    opened = functools.cache(functools.partial(zipfile.ZipFile, path))
    with open_zip(path, size) as archive:
        found = []
        for part in archive.infolist():
            if not part.filename.endswith(".npy"):
                raise CheckpointError(f"fastvit: {path}: {part.filename[:80]!r} is no array of NumPy")
            name = part.filename.removesuffix(".npy")
            with archive.open(part) as file:
                start, shape, dtype, fortran = _header(file, name)
            wanted = math.prod(shape) * dtype.itemsize
            if start + wanted != part.file_size:
                raise CheckpointError(
                    f"fastvit: {path}: {name!r} {shape} needs {wanted} bytes, the archive has {part.file_size - start}"
                )
            found.append(Entry(name, shape, dtype, _reader(opened, part.filename, start, shape, dtype, fortran)))
    return found


def _header(file: IO[bytes], name: str) -> tuple[int, tuple[int, ...], torch.dtype, bool]:
    """Where the data begins, shape, dtype and whether the first dimension is the fastest."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or len(magic) < 8 or magic[6] not in (1, 2, 3):
        raise CheckpointError(f"fastvit: {name!r} is no array of NumPy but begins with {magic[:8]!r}")
    digits = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(digits), "little")
    if length > MOST_LINE:
        raise CheckpointError(f"fastvit: {name!r} claims a header of {length} bytes")
    try:
        facts = ast.literal_eval(file.read(length).decode("latin1").strip())
        descr, fortran, shape = facts["descr"], facts["fortran_order"], facts["shape"]
    except (ValueError, TypeError, KeyError, SyntaxError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"fastvit: {name!r} has a damaged header: {error}") from None
    if not isinstance(descr, str) or descr not in DTYPES or not isinstance(fortran, bool):
        what = "objects, which only a pickle could restore" if descr == "|O" else f"dtype {str(descr)[:40]!r}"
        raise CheckpointError(f"fastvit: {name!r} is an array of {what}; expected one of {', '.join(DTYPES)}")
    return 8 + digits + length, checked_shape(shape, name), DTYPES[descr], fortran


def _reader(
    archive: Callable[[], zipfile.ZipFile],
    part: str,
    start: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fortran: bool,
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        whole = archive()
        try:
            with whole.open(part) as file:
                file.read(start)
                tensor = filled(file, shape[::-1] if fortran else shape, dtype)
        except BaseException:
            whole.close()  # the traceback would keep it open until somebody collects garbage
            raise
        return tensor.permute(*reversed(range(len(shape)))) if fortran else tensor

    return read
