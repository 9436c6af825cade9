"""Whole forward passes as CUDA graphs: captured once for each shape of the input, then replayed.

At batch 1 a Vision Transformer's kernels take less time than Python needs to launch them; a replay launches all of them
at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Replay = Callable[[], Any]
DEVICE = "cuda"


@dataclass
class _Captured:
    """A captured pass: where it reads its input, what it wrote last, and how to run it again."""

    static: Tensor
    result: Any
    replay: Replay


@contextmanager
def _casts_captured() -> Iterator[None]:
    """Autocast must not keep a weight that one pass cast for the next one: a replay would never cast it again."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _capture(forward: Callable[[Tensor], Any], static: Tensor, pool: Any) -> tuple[Any, Replay]:
    # Libraries allocate workspaces and kernels are compiled in the first passes, which must not be captured.
    current, side = torch.cuda.current_stream(static.device), torch.cuda.Stream(static.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            forward(static)
    current.wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.device(static.device), torch.cuda.graph(captured, pool=pool):
        result = forward(static)
    return result, captured.replay


def _pool() -> Any:
    return torch.cuda.graph_pool_handle()


def _check(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.device.type != DEVICE:
        got = f"one on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"fastvit.graph: {name} must be a CUDA tensor, got {got}")


def _copied(result: Any) -> Any:
    """A result of the caller's own: the next replay writes over the graph's."""
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, dict):  # ModelOutput of transformers is one, and its constructor takes the same names
        return type(result)(**{name: _copied(value) for name, value in result.items()})
    if isinstance(result, (list, tuple)):
        values = [_copied(value) for value in result]
        return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)
    return result


class Graph:
    """A model's forward pass for inference, captured per shape. See :func:`graph`."""

    def __init__(self, model: nn.Module, max_shapes: int) -> None:
        self.model, self.max_shapes = model, max_shapes
        self._captured: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()
        self._memory = _pool()

    def __call__(self, x: Tensor) -> Any:
        """The model's result for x, in memory of its own."""
        if self.model.training:
            raise RuntimeError("fastvit.graph: the model is in training mode; call model.eval() first")
        _check("x", x)
        key = (tuple(x.shape), x.dtype, x.device, self._state())
        found = self._captured.get(key)
        if found is None:
            found = self._add(key, x)
        self._captured.move_to_end(key)
        with torch.no_grad():
            found.static.copy_(x)
            found.replay()
            return _copied(found.result)

    def shapes(self) -> list[tuple[int, ...]]:
        """The captured shapes, the one used last at the end."""
        return [key[0] for key in self._captured]

    def _state(self) -> tuple[Any, ...]:
        """What a captured pass has taken as given: where the parameters lie, and autocast."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        autocast = torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE)
        return hash(tuple(t.data_ptr() for t in tensors)), autocast

    def _add(self, key: tuple[Any, ...], x: Tensor) -> _Captured:
        for old in [old for old in self._captured if old[3] != key[3]]:
            del self._captured[old]  # parameters have moved: what it read may be freed memory
        while len(self._captured) >= self.max_shapes:
            self._captured.popitem(last=False)
        with torch.no_grad(), _casts_captured():
            static = x.detach().clone(memory_format=torch.preserve_format)
            result, replay = _capture(self.model, static, self._memory)
        self._captured[key] = _Captured(static, result, replay)
        return self._captured[key]


def graph(model: nn.Module, example: Tensor, *, max_shapes: int = 8) -> Graph:
    """A callable that replays the model's forward pass as one CUDA graph per input shape.

    For inference at small batches, where launching kernels takes longer than running them. New numbers in the same
    parameters (an optimizer step, ``load_state_dict``) are seen; parameters that moved (``.to()``) and another autocast
    are captured anew, and so is every new shape.

    Args:
        model: in evaluation mode, on a CUDA device. Its forward pass must not wait for the device (``.item()``).
        example: an input, (B, C, height, width) for instance; its shape is captured right away.
        max_shapes: how many shapes to keep; the one not used for longest goes first.

    Returns:
        A callable of one tensor. Every result is a copy: a later call does not change it.

    Raises:
        ValueError: the example is no CUDA tensor, or max_shapes is no positive integer.
        RuntimeError: the model is in training mode, or cannot be captured.

    Source: the "Whole-network capture" of PyTorch's CUDA semantics.
    """
    if not isinstance(max_shapes, int) or max_shapes < 1:
        raise ValueError(f"fastvit.graph: max_shapes must be a positive integer, got {max_shapes!r}")
    _check("example", example)
    captured = Graph(model, max_shapes)
    captured(example)
    return captured
