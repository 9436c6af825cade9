"""What one pass asks of each op, as PyTorch's own observers see it: the ops in order, their tensors and options.

A TorchDispatchMode would see as much, and change what it looks at: under one an accelerated model computes as its class
does (`fastvit.watch.observed`), and in inference mode an op made of others arrives before it has chosen them. The
execution trace is written by callbacks inside the ops' calls, and nothing that runs knows of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

OURS = ("fastvit::", "fastvit_native::")
# what gives memory and writes nothing there
_ALLOCATIONS = ("aten::empty", "aten::new_empty")


@dataclass(frozen=True)
class Operand:
    """A tensor as an op saw it: its memory, where it begins there, shape, strides in numbers, dtype, bytes of one."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def count(self) -> int:
        """Numbers that it holds; those that an expanded tensor repeats are there once."""
        return math.prod(n for n, stride in zip(self.shape, self.strides, strict=True) if stride or n == 0)

    @property
    def bytes(self) -> int:
        return self.count * self.itemsize

    @property
    def place(self) -> tuple[int, int, int]:
        """Equal for two views of the same numbers."""
        return self.storage, self.offset, self.count


@dataclass(frozen=True)
class Call:
    """One call of an op: its arguments and results in the schema's order, tensors as `Operand`s."""

    op: Any
    arguments: tuple[Any, ...]
    results: tuple[Any, ...]

    @property
    def name(self) -> str:
        """As the profiler names it: "aten::addmm"."""
        return str(self.op._schema.name)

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by their names in the schema."""
        return {argument.name: given for argument, given in zip(self.op._schema.arguments, self.arguments, strict=True)}

    @property
    def written(self) -> list[tuple[Any, Operand]]:
        """The arguments that the op writes to, each with its entry in the schema."""
        pairs = zip(self.op._schema.arguments, self.arguments, strict=True)
        changed = [(its, given) for its, given in pairs if its.alias_info is not None and its.alias_info.is_write]
        return [(its, operand) for its, given in changed for operand in operands(given)]

    @property
    def moves(self) -> bool:
        """Whether it has work to do: allocations and views, whose results lie in an argument's memory, have none."""
        if self.name.startswith(_ALLOCATIONS):
            return False
        memory = {operand.storage for operand in operands(self.arguments)}
        results = operands(self.results)
        return bool(self.written) or not results or any(result.storage not in memory for result in results)


def operands(given: Any) -> list[Operand]:
    """The tensors in an argument, which may be a list of them."""
    if isinstance(given, (list, tuple)):
        return [operand for one in given for operand in operands(one)]
    return [given] if isinstance(given, Operand) else []


@dataclass(frozen=True)
class Recording:
    """The calls of a pass in order, and how to find them again in what a profiler saw of another pass.

    steps: each op whose name is one of the calls', in order; a call's own, or None for one inside another's call.
    """

    steps: tuple[tuple[str, Call | None], ...]

    @property
    def calls(self) -> list[Call]:
        return [call for _, call in self.steps if call is not None]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.steps)

    def places(self, names: Sequence[str]) -> list[int]:
        """Where the calls are among the ops of another pass, of which those in `names` have been kept.

        Raises:
            RuntimeError: that pass ran other ops.
        """
        if [name for name, _ in self.steps] != list(names):
            raise RuntimeError("profile: two passes of the same work ran different ops")
        return [place for place, (_, call) in enumerate(self.steps) if call is not None]


def record(call: Callable[[], object]) -> Recording:
    """Run the call once and tell what ran.

    Raises:
        RuntimeError: another observer is writing an execution trace in this process.
    """
    from torch.profiler import ExecutionTraceObserver

    observer = ExecutionTraceObserver()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        if not observer.register_callback(str(path)).is_registered:
            raise RuntimeError("profile: another observer is writing an execution trace in this process")
        try:
            with quiet():
                observer.start()
            call()
        finally:
            with quiet():
                observer.unregister_callback()
        return read(json.loads(path.read_text())["nodes"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr: torch's observers say there that they begin and end, and cannot be asked not to."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def read(nodes: Sequence[Mapping[str, Any]]) -> Recording:
    """The recording in the nodes of an execution trace."""
    children: dict[int, list[Mapping[str, Any]]] = {}
    for node in sorted(nodes, key=lambda node: node["id"]):  # numbered as they begin
        children.setdefault(node["ctrl_deps"], []).append(node)
    threads = [node for node in nodes if node["name"].endswith("execution_trace|thread]")]
    caller = min((node["id"] for node in threads), default=None)
    # Threads of a parallel kernel call ops too, in any order; the profiler leaves them out.
    roots = [
        node
        for thread in threads
        for node in children.get(thread["id"], [])
        if thread["id"] == caller or node["name"].startswith("autograd::engine")
    ]
    found = [step for root in sorted(roots, key=lambda node: node["id"]) for step in _below(root, children, False)]
    names = {call.name for _, call in found if call is not None}
    return Recording(tuple((name, call) for name, call in found if name in names))


def _below(
    node: Mapping[str, Any], children: Mapping[int, list[Mapping[str, Any]]], inside: bool
) -> Iterator[tuple[str, Call | None]]:
    """The ops of a tree in order, each with its call if it is one and none of its parents is."""
    call = None if inside else _call(node)
    yield node["name"], call if call is not None and call.moves else None
    for child in children.get(node["id"], []):
        yield from _below(child, children, inside or call is not None)


def _call(node: Mapping[str, Any]) -> Call | None:
    """The call of an op that does its work itself; None for one made of others, and for what is no op."""
    schema = next((entry["value"] for entry in node["attrs"] if entry["name"] == "op_schema"), "")
    name = schema.partition("(")[0]
    if not name.startswith(("aten::", *OURS)):
        return None
    op = _overload(name)
    if op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return None
    return Call(op, tuple(_values(node["inputs"])), tuple(_values(node["outputs"])))


def _overload(name: str) -> Any:
    """The op called "aten::add.Tensor"."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _values(told: Mapping[str, Any]) -> list[Any]:
    columns = (told["values"], told["shapes"], told["types"], told["strides"])
    return [_value(*row) for row in zip(*columns, strict=True)]


def _value(value: Any, shape: Any, kind: str, strides: Any) -> Any:
    """A tensor as an `Operand`, a list as a list, "<None>" and a tensor that is undefined as None."""
    if kind.startswith("Tensor("):
        storage, offset, _, itemsize, _ = value[1:]
        dtype = kind.removeprefix("Tensor(").removesuffix(")")
        if "uninitialized" in dtype:
            return None
        return Operand(storage, offset, tuple(shape), tuple(strides), _DTYPES.get(dtype, dtype), itemsize)
    if kind.startswith("GenericList["):
        kinds = kind.removeprefix("GenericList[").removesuffix("]").split(",")
        if kinds == [""] or len(kinds) != len(value):  # a list of lists, which no op with FLOPs takes
            return value
        return [_value(*row) for row in zip(value, shape, kinds, strides, strict=True)]
    return None if value == "<None>" else value


# C++'s names of them
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "c10::Half": "float16",
    "c10::BFloat16": "bfloat16",
    "unsigned char": "uint8",
    "signed char": "int8",
    "int": "int32",
    "long int": "int64",
    "long": "int64",
}
