"""The pickles of CIFAR read as a description: containers, strings, numbers and byte arrays; nothing in them runs."""

import io
import math
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .source import DataError

# what would call, look up or allocate by a stranger's word, and no such file holds
_REFUSED = (
    *("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"),
    *("NEXT_BUFFER", "READONLY_BUFFER"),
)
_EARLY = (EOFError, struct.error, IndexError)  # what Python's unpickler trips over where a file ends
_KNOWN: dict[int, Any] = dict(pickle._Unpickler.dispatch)


class _Dtype:
    """numpy.dtype, which may be bytes alone."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if kind not in (b"u1", "u1", b"|u1", "|u1"):
            raise pickle.UnpicklingError(f"an array of dtype {kind!r}, expected uint8")

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """numpy.ndarray as its pickle describes it."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    sides = shape if isinstance(shape, tuple) else ()
    whole = all(type(side) is int and side >= 0 for side in sides)
    if not isinstance(data, bytes) or not isinstance(dtype, _Dtype) or not whole or math.prod(sides) != len(data):
        raise pickle.UnpicklingError(f"an array of shape {shape!r} that is not as many bytes")
    return np.frombuffer(data, np.uint8).reshape(sides, order="F" if order in ("F", b"F") else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("a call of codecs.encode for what is no string of bytes")
    return text.encode("latin1")


def _ndarray(*_: Any) -> None:
    raise pickle.UnpicklingError("a call of numpy.ndarray")


_GLOBALS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,  # how Python 3 writes bytes in the protocol of Python 2
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _Dtype,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (("multiarray", "_reconstruct", _reconstruct), ("numeric", "_frombuffer", _array))
    },
}


# Python's own unpickler: the one in C reserves a table as long as the largest number a file mentions.
class _Description(pickle._Unpickler):
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in _KNOWN.items() if code not in {getattr(pickle, name)[0] for name in _REFUSED}
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name}"[:120])
        return _GLOBALS[module, name]

    def load_bytearray8(self) -> None:
        """As much as the file holds; Python's own allocates what the file claims."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(min(length, sys.maxsize)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def described(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle; arrays are numpy's uint8, strings of Python 2 are bytes, keys are strings.

    Raises:
        DataError: the file is no pickle, ends early, or holds anything but containers, strings, numbers and bytes.
    """
    try:
        found = _Description(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except Exception as error:  # whatever bytes that are no pickle lead to
        if isinstance(error, _EARLY) or "exhausted" in str(error):
            raise DataError(f"{path}: the pickle ends early: the file is truncated") from None
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: not as CIFAR is pickled (containers, strings, numbers, bytes and nothing else): {detail[:160]}"
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: the pickle holds a {type(found).__name__}, expected a dictionary")
    return {_text(key): value.value if isinstance(value, _Array) else value for key, value in found.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def names(value: Any, path: Path, key: str) -> list[str]:
    """A list of strings.

    Raises:
        DataError: it is none, or empty.
    """
    if not isinstance(value, list) or not value or not all(isinstance(name, (str, bytes)) for name in value):
        raise DataError(f"{path}: {key!r} is missing or no list of names")
    return [_text(name) for name in value]
