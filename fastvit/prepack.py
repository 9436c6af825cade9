"""Weights in the layout that the CPU kernels read, kept beside the parameters they were made from.

A copy is made once and used until its parameter changes: another version (an optimizer step, load_state_dict), other
memory (``.to()``), or other numbers where a few are looked at (a change through ``.data``, which leaves the version as
it was). Equal weights, such as those of a deep copy, share one. A copy dies with its parameter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class _Packed:
    """The copies of one weight, by what they are computed in: "float32", "bfloat16", or a vector's "vector"."""

    state: tuple
    copies: dict[str, Tensor]


_packed: Any = WeakIdKeyDictionary()
# (shape, dtype, fingerprint of the numbers) -> a weight that has copies; where a deep copy finds them
_by_content: dict[tuple, Any] = {}


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _isa() -> str:
    return torch.ops.fastvit_native.cpu_isa("current")


def state(tensors: Sequence[Tensor]) -> tuple:
    """What changes, most likely, whenever one of these CPU tensors does."""
    return tuple(map(_version, tensors)), torch.ops.fastvit_native.fingerprint(tensors, True)


def weight(tensor: Tensor, compute: str) -> Tensor:
    """The weight (N, K) of a linear layer for products in ``compute``, packed now or before."""
    return _copy(
        tensor, f"{compute}, {_isa()}", lambda: torch.ops.fastvit_native.pack_weight(tensor.flatten(1), compute)
    )


def weight_if_kept(tensor: Tensor) -> Tensor | None:
    """The packed weight (N, K) or (N, ...), or None where it pays better to pack it for one call alone.

    That is where it has changed since the last call, as it does at each step of a training run.
    """
    if not isinstance(tensor, torch.nn.Parameter):
        return None
    entry, now = _packed.get(tensor), state([tensor])
    if entry is None or entry.state != now:
        _packed[tensor] = _Packed(now, {})
        return None
    return weight(tensor, "float32" if tensor.dtype == torch.float16 else str(tensor.dtype).removeprefix("torch."))


def vector(tensor: Tensor | None) -> Tensor:
    """A parameter (D,) as float32: itself, or a copy; an empty tensor for None."""
    if tensor is None:
        return _ABSENT
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return _copy(tensor, "vector", lambda: tensor.to(torch.float32).contiguous())


_ABSENT = torch.empty(0)


def _copy(tensor: Tensor, kind: str, make: Any) -> Tensor:
    now = state([tensor])
    entry = _packed.get(tensor)
    if entry is None or entry.state != now:
        entry = _packed[tensor] = _Packed(now, {})
    if not entry.copies:
        entry.copies = _twin_copies(tensor)
    if kind not in entry.copies:
        with torch.no_grad():
            entry.copies[kind] = make()
    return entry.copies[kind]


def _twin_copies(tensor: Tensor) -> dict[str, Tensor]:
    """The copies of an equal weight, in a dict that this one shares from now on, or a new dict."""
    content = (tuple(tensor.shape), tensor.dtype, torch.ops.fastvit_native.fingerprint([tensor], False))
    twin = _by_content[content]() if content in _by_content else None
    if twin is not None and twin is not tensor:
        entry = _packed.get(twin)
        if entry is not None and entry.state == state([twin]) and torch.equal(twin, tensor):
            return entry.copies
    _by_content[content] = ref(tensor, lambda _: _by_content.pop(content, None))
    return {}


# where a block's parameters hold the weights of linear layers; the others are vectors
_LINEAR = (2, 4, 9, 11)
_PER_BLOCK = 14
# first weight of an encoder -> (its parameters' ids, their state, what is computed in, the packed parameters)
_encoders: Any = WeakIdKeyDictionary()


def encoder(parameters: Sequence[Tensor | None], compute: str, int8: Sequence[bool] = ()) -> list[Tensor]:
    """The parameters of whole blocks (see ``fastvit.ops.EncoderBlock``) as the kernel takes them.

    ``int8`` says for each linear layer whether it is computed in that instead, and is empty where none is. A forward
    pass asks for hundreds of them: while none has changed, one look at all of them finds the list of before.
    """
    if not parameters:
        return []
    tensors = [t for t in parameters if t is not None]
    first: Any = parameters[_LINEAR[0]]
    key = ([*map(id, parameters)], state(tensors), compute, tuple(int8), _isa())
    known = _encoders.get(first)
    if known is None or known[0] != key:
        packed = []
        for i, tensor in enumerate(parameters):
            block, place = divmod(i, _PER_BLOCK)
            if place in _LINEAR and tensor is not None:
                quantised = bool(int8) and int8[len(_LINEAR) * block + _LINEAR.index(place)]
                packed.append(weight(tensor, "int8" if quantised else compute))
            else:
                packed.append(vector(tensor))
        known = _encoders[first] = (key, packed)
    return known[1]


def forget(tensors: Iterable[Tensor]) -> None:
    """Drop the copies of these parameters."""
    for tensor in tensors:
        _packed.pop(tensor, None)
        _encoders.pop(tensor, None)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that the copies of these parameters take, each counted once."""
    kept = {id(copy): copy for t in tensors if (entry := _packed.get(t)) for copy in entry.copies.values()}
    return sum(copy.untyped_storage().nbytes() for copy in kept.values())
