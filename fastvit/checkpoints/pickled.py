"""What torch.save writes, read as a description: the pickle may name tensors and containers, and can call nothing else.

torch.load(weights_only=True) is as strict about code, but it allocates what the pickle asks for and reads everything
before anybody has seen a shape.
"""

import functools
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .error import CheckpointError
from .files import Entry, checked_shape, filled
from .npz import open_zip

MOST_PICKLE = 64 << 20
# where training scripts keep the weights, the averaged ones first, as timm chooses
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Strided:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Dict(dict):
    """A container to which a pickle may attach notes, as state_dict's _metadata."""


def _empty_dict(*items: Any) -> _Dict:
    if items:
        raise pickle.UnpicklingError("a dictionary made of arguments")
    return _Dict()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Strided:
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise pickle.UnpicklingError("a tensor without a storage")
    shape, stride = checked_shape(shape, storage.key), checked_shape(stride, storage.key)
    if len(shape) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {stride}")
    count = math.prod(shape)
    if count > storage.numel or any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True)):
        raise CheckpointError(
            f"fastvit: a tensor of shape {shape} and strides {stride} shows {storage.numel} numbers more than once"
        )
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if count and last >= storage.numel:
        raise CheckpointError(f"fastvit: a tensor of shape {shape} ends behind its storage of {storage.numel} numbers")
    return _Strided(storage, offset, shape, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}
# no instances, no classes, no sets, no buffers to allocate: what torch.save writes of weights needs none
_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE"),
    *("SHORT_BINUNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
)


_KNOWN: dict[int, Any] = dict(pickle._Unpickler.dispatch)


# Python's own unpickler: the one in C reserves a table as long as the largest number a file mentions.
class _Description(pickle._Unpickler):
    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {code: _KNOWN[code] for code in (getattr(pickle, n)[0] for n in _OPCODES)}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise CheckpointError(
                f"fastvit: the pickle asks for {module}.{name}"[:200]
                + ", which is no weight; save the state_dict alone"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
            raise pickle.UnpicklingError("a reference to what is no storage")
        _, dtype, key, _, numel = pid
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a storage without a name or a size")
        return _Storage(key, dtype, numel)

    def load_build(self) -> None:
        """Notes on a dictionary are left out; nothing else has a state."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dict):
            raise pickle.UnpicklingError("a state for what is no dictionary")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        if self.stack[-1] not in (_empty_dict, _rebuild_tensor, _rebuild_parameter) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call of what is no function")
        self.stack[-1] = self.stack[-1](*arguments)

    def _plain_keys(self, keys: list[Any]) -> None:
        # the hash of tuples in tuples takes time that doubles with each
        if not all(type(key) in (str, int) for key in keys):
            raise pickle.UnpicklingError("a key that is neither a string nor a number")

    def load_setitem(self) -> None:
        self._plain_keys(self.stack[-2:-1])
        _KNOWN[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        self._plain_keys(self.stack[::2])
        _KNOWN[pickle.SETITEMS[0]](self)

    def load_dict(self) -> None:
        self._plain_keys(self.stack[::2])
        _KNOWN[pickle.DICT[0]](self)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


def entries(path: Path, size: int) -> Iterable[Entry]:
    """The tensors of a file of torch.save (since PyTorch 1.6).

    Raises:
        CheckpointError: an older file, a TorchScript archive, a pickle that holds more than weights, a tensor that
            shows memory twice or leaves its storage.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"fastvit: {path} is no zip archive of torch.save: truncated, or from before PyTorch 1.6; save it again: "
            "torch.save(torch.load(old, weights_only=True), new)"
        )
    with open_zip(path, size) as archive:
        sizes = {part.filename: part.file_size for part in archive.infolist()}
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise CheckpointError(f"fastvit: {path} has compressed parts, which torch.save never writes")
        pickles = [name for name in sizes if name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in sizes):
            raise CheckpointError(
                f"fastvit: {path} is a TorchScript archive, a program; save torch.jit.load(path).state_dict() instead"
            )
        if len(pickles) != 1 or sizes[pickles[0]] > MOST_PICKLE:
            raise CheckpointError(f"fastvit: {path} must have one data.pkl of at most {MOST_PICKLE} bytes")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in sizes and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError(f"fastvit: {path} was written on a big-endian machine")
        with archive.open(pickles[0]) as file:
            tensors = _described(file, path)
    found, opened = [], functools.cache(functools.partial(zipfile.ZipFile, path))
    for name, tensor in tensors.items():
        part = f"{root}data/{tensor.storage.key}"
        wanted = tensor.storage.numel * tensor.storage.dtype.itemsize
        if sizes.get(part) != wanted:
            raise CheckpointError(f"fastvit: {path}: {name!r} needs {wanted} bytes, {part} has {sizes.get(part)}")
        found.append(Entry(name, tensor.shape, tensor.storage.dtype, _reader(opened, part, tensor)))
    if sum(entry.bytes for entry in found) > 4 * size:
        raise CheckpointError(f"fastvit: {path} shows the same numbers in more than four tensors each")
    return found


def _described(file: Any, path: Path) -> dict[str, _Strided]:
    try:
        found = _Description(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({path})") from None
    except Exception as error:
        raise CheckpointError(f"fastvit: {path} holds more than weights, or is damaged: {error!r}"[:400]) from None
    for name in CONTAINERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict):
        raise CheckpointError(f"fastvit: {path} holds a {type(found).__name__}, not a state_dict")
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, _Strided)}


def _reader(archive: Callable[[], zipfile.ZipFile], part: str, tensor: _Strided) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with archive().open(part) as file:
            flat = filled(file, (tensor.storage.numel,), tensor.storage.dtype)
        shown = flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
        return shown if shown.numel() == flat.numel() else shown.clone()

    return read
