"""Weights in the layout that the CPU kernels read, kept beside the parameters they were made from or instead of them.

A copy is made once and used until its parameter changes: another version (an optimizer step, load_state_dict), other
memory (``.to()``), or other numbers where a few are looked at (a change through ``.data``, which leaves the version as
it was). Equal weights, such as those of a deep copy, share one. A copy dies with its parameter.
"""

import operator
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


def compute_of(dtype: torch.dtype) -> str:
    """What products of this dtype are computed in; each of its numbers is one of that, too."""
    return "float32" if dtype == torch.float16 else str(dtype).removeprefix("torch.")


class Released(Tensor):
    """A parameter (N, K) whose numbers are in its packed copy alone: no storage, but the original's shape and dtype.

    ``detach`` (and so ``state_dict``), ``to``, ``copy_`` (and so ``load_state_dict``), deep copies and pickles go
    through the packed copy. Whatever would compute with the weight raises RuntimeError.
    """

    _is_param = True  # what nn.Parameter's isinstance asks for
    __torch_function__: Any = torch._C._disabled_torch_function_impl
    packed: Tensor
    compute: str
    path: str

    def __new__(cls, packed: Tensor, compute: str, like: Tensor, path: str) -> "Released":
        """``packed`` for ``compute``, in the place of the weight ``like`` at ``path`` in its model."""
        self = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        self.packed, self.compute, self.path = packed, compute, path
        return self

    @property
    def exact(self) -> bool:
        """Whether the packed copy holds the very numbers of the original."""
        return self.compute == compute_of(self.dtype)

    def detach(self) -> Tensor:
        """The numbers, unpacked for this call: what is written there changes no parameter."""
        if not self.exact:
            raise RuntimeError(
                f"{self.path}: the original was released, and its {self.compute} copy does not hold it: load it from "
                "your checkpoint (model.load_state_dict)"
            )
        return torch.ops.fastvit_native.unpack_weight(self.packed).to(self.dtype)

    def _set_data(self, value: Tensor) -> None:
        if value is not self:  # Module.to, to another dtype or device: an ordinary parameter again
            forget([self])
            torch.utils.swap_tensors(self, nn.Parameter(value, requires_grad=self.requires_grad))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise _refusal("a direct access to memory", "the weight")

    data = property(_refuse, _set_data)
    share_memory_ = __dlpack__ = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> "Released":
        memo[id(self)] = twin = Released(self.packed, self.compute, self, self.path)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), requires_grad=self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Released(shape={tuple(self.shape)}, dtype={self.dtype}, packed for {self.compute})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        packet, aten = op.overloadpacket, torch.ops.aten
        if packet is aten.copy_ and isinstance(args[0], cls):
            target, compute = args[0], compute_of(args[0].dtype)
            numbers = torch.empty(target.shape, dtype=target.dtype).copy_(args[1])
            target.packed, target.compute = torch.ops.fastvit_native.pack_weight(numbers, compute), compute
            return target
        if packet is aten._has_compatible_shallow_copy_type:  # Module.to in inference mode
            return args[0] is args[1]
        if packet in (aten.copy_, aten._to_copy, aten.to, aten.clone) and not torch.is_grad_enabled():
            unpacked = [a.detach() if isinstance(a, cls) else a for a in args]
            result = op(*unpacked, **(kwargs or {}))
            return args[0] if result is unpacked[0] else result
        named = [*zip((a.name for a in op._schema.arguments), args, strict=False), *(kwargs or {}).items()]
        names = [name for name, value in named if isinstance(value, cls)]
        raise _refusal(op._schema.name.replace("::", "."), names[0] if names else "a weight")


def _refusal(op: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"{op}: {name} was released (accelerate(..., release_original=True)), which leaves inference by the CPU's "
        "encoder kernel, without gradients; call fastvit.restore(model) first"
    )


@dataclass(eq=False)
class _Packed:
    """The copies of one weight, by what they are computed in: "float32", "bfloat16", or a vector's "vector"."""

    weight: Any
    state: tuple
    copies: dict[str, Tensor]


_packed: Any = WeakIdKeyDictionary()
# (shape, dtype, fingerprint of the numbers) -> what is packed of such a weight; where a deep copy finds it
_by_content: WeakValueDictionary[tuple, _Packed] = WeakValueDictionary()
# threads that call a model for the first time at once would each pack it
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


_VERSION = operator.attrgetter("_version")


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [*map(_VERSION, tensors)]
    except RuntimeError:  # a tensor made in inference mode has none
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _stored(tensor: Any) -> Tensor:
    return tensor.packed if type(tensor) is Released else tensor


def state(tensors: Sequence[Tensor]) -> tuple:
    """What changes, most likely, whenever one of these CPU tensors does, and with the instruction set in force."""
    return _versions(tensors), torch.ops.fastvit_native.fingerprint([*map(_stored, tensors)], True)


# as csrc/cpu/packed.h numbers them
_COMPUTES = ("float32", "bfloat16", "float64", "int8")


def weight(tensor: Tensor, compute: str) -> Tensor:
    """The weight (N, K) of a linear layer for products in ``compute``, packed now or before."""
    if isinstance(tensor, Released) and tensor.compute == compute:
        return tensor.packed
    if tensor.dtype == torch.uint8:  # what a graph has instead of a released weight
        its = _COMPUTES[int(tensor[16:24].view(torch.int64))]
        if its != compute:
            raise RuntimeError(f"encoder: in a graph, a weight released in {its} cannot serve products in {compute}")
        return tensor
    return _copy(
        tensor,
        compute,
        lambda: torch.ops.fastvit_native.pack_weight(tensor.detach().flatten(1).contiguous(), compute),
    )


def weight_if_kept(tensor: Tensor) -> Tensor | None:
    """The packed weight (N, K) or (N, ...), or None where it pays better to pack it for one call alone.

    That is where it has changed since the last call, as it does at each step of a training run.
    """
    if not isinstance(tensor, torch.nn.Parameter):
        return None
    entry, now = _packed.get(tensor), state([tensor])
    if entry is None or entry.state != now:
        _packed[tensor] = _Packed(ref(tensor), now, {})
        return None
    compute = compute_of(tensor.dtype)
    packed = entry.copies.get(compute)
    return weight(tensor, compute) if packed is None else packed


def vector(tensor: Tensor | None) -> Tensor:
    """A parameter (D,) as float32: itself, or a copy; an empty tensor for None."""
    if tensor is None:
        return _ABSENT
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return _copy(tensor, "vector", lambda: tensor.to(torch.float32).contiguous())


def derived(tensor: Tensor, kind: str, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` computes from this parameter alone: kept on a CPU, and made again when it changes.

    ``kind`` names it among all that are kept of the parameter.
    """
    if not _can_keep(tensor):
        return make()

    def outside_inference_mode() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make()

    return _copy(tensor, kind, outside_inference_mode)


def _can_keep(tensor: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and tensor.device.type == "cpu" and hasattr(torch.ops.fastvit_native, "fingerprint")


_ABSENT = torch.empty(0)


def _copy(tensor: Tensor, kind: str, make: Any) -> Tensor:
    with _lock:
        now = state([tensor])
        entry = _packed.get(tensor)
        if entry is None or entry.state != now:
            entry = _packed[tensor] = _Packed(ref(tensor), now, {})
        if not entry.copies:
            _share(entry, tensor)
        if kind not in entry.copies:
            with torch.no_grad():
                entry.copies[kind] = make()
        return entry.copies[kind]


def _share(entry: _Packed, tensor: Tensor) -> None:
    """Take the copies of an equal weight from now on, or else be where the next one finds its own."""
    stored = _stored(tensor)
    content = (tuple(stored.shape), stored.dtype, torch.ops.fastvit_native.fingerprint([stored], False))
    other = _by_content.get(content)
    twin = None if other is None else other.weight()
    if other is None or twin is None or twin is tensor or _is_freed(twin) or other.state != state([twin]):
        _by_content[content] = entry
    elif torch.equal(_stored(twin), stored):
        entry.copies = other.copies
    else:
        _by_content[content] = entry


def _is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's numbers were given back under it, as FSDP does with whole parameters between their uses."""
    return type(tensor) is not Released and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


# first of several tensors -> (their ids, their state, all of them in one)
_joined: Any = WeakIdKeyDictionary()


def joined(tensors: Sequence[Tensor | None]) -> Tensor:
    """Weights or biases of queries, keys and values one below the other, zeros for None; one must be there.

    For inference on a CPU they are kept, and made again when one of them changes.
    """
    present = [t for t in tensors if t is not None]
    first = present[0]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in present)
    if differentiable or not _can_keep(first):
        return _concatenated(tensors, first)
    key = ([*map(id, tensors)], state(present))
    known = _joined.get(first)
    if known is None or known[0] != key:
        with _lock, torch.inference_mode(False), torch.no_grad():
            made = nn.Parameter(_concatenated(tensors, first), requires_grad=False)
            known = _joined[first] = (key, made)
    return known[1]


def _concatenated(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return torch.cat([like.new_zeros(like.shape) if t is None else t for t in tensors])


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
    if first.dtype == torch.uint8:  # it would be in a list that lives as long as itself
        return _pack_all(parameters, compute, int8)
    key = ([*map(id, parameters)], state(tensors), compute, [*int8])
    known = _encoders.get(first)
    if known is None or known[0] != key:
        with _lock:
            known = _encoders[first] = (key, _pack_all(parameters, compute, int8))
    return known[1]


def _pack_all(parameters: Sequence[Tensor | None], compute: str, int8: Sequence[bool]) -> list[Tensor]:
    packed = []
    for i, tensor in enumerate(parameters):
        block, place = divmod(i, _PER_BLOCK)
        if place in _LINEAR and tensor is not None:
            quantised = bool(int8) and int8[len(_LINEAR) * block + _LINEAR.index(place)]
            packed.append(weight(tensor, "int8" if quantised else compute))
        else:
            packed.append(vector(tensor))
    return packed


def forget(tensors: Iterable[Tensor]) -> None:
    """Drop the copies of these parameters."""
    for tensor in tensors:
        for copies in (_packed, _encoders, _joined):
            copies.pop(tensor, None)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that the copies of these parameters take, each counted once."""
    tensors = list(tensors)
    together = [_joined[t][1] for t in tensors if t in _joined]
    tensors += together
    kept = {id(t): t for t in together}
    kept |= {id(copy): copy for t in tensors if (entry := _packed.get(t)) for copy in entry.copies.values()}
    kept |= {id(t.packed): t.packed for t in tensors if isinstance(t, Released)}
    return sum(copy.untyped_storage().nbytes() for copy in kept.values())


def released_bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that the originals of these parameters no longer take."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Released))
