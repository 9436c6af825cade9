"""Whether modules are still what they were, told by one look at their dictionaries, and whether somebody looks on.

Between two calls of a model the caches hold its weights, and every line of Python is slow: reading twelve blocks
attribute by attribute then takes as long as two of the blocks themselves.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn.modules.module import _has_any_global_hook


def observed() -> bool:
    """Whether something is on that has to see each module or each of torch's own operations.

    That is a transform of torch.func, forward-mode derivatives, torch.fx, a TorchDispatchMode (fake tensors, counters
    of FLOPs, make_fx) or a hook on all modules. torch.compile and torch.export know the ops.
    """
    return not torch.compiler.is_compiling() and bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or _symbolic_trace._is_fx_tracing_flag
        or _has_any_global_hook()
    )


class Watch:
    """The children, parameters and hooks of a module and of all below it, and some plain attributes.

    Args:
        root: the module. Its own hooks are not looked at: whoever calls it runs them.
        attributes: (module, name of an attribute), to be compared by value.
    """

    def __init__(self, root: nn.Module, attributes: Iterable[tuple[nn.Module, str]] = ()) -> None:
        modules = [*root.modules()]
        self._children = [module._modules for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules if module._parameters]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(module, kind) for module in modules[1:] for kind in kinds]
        pairs = [(module.__dict__, name) for module, name in attributes]
        self._dicts, self._names = [d for d, _ in pairs], [name for _, name in pairs]
        self._before = self._look(self._values(self._parameters))

    @staticmethod
    def _values(dicts: Iterable[dict[str, Any]]) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, dicts))]

    def _look(self, parameters: list[Any]) -> tuple[list[Any], ...]:
        children = self._values(self._children)
        # types as well: an address may be used again
        identities = [*map(id, children)], [*map(type, children)], [*map(id, parameters)]
        return (*identities, [*map(dict.get, self._dicts, self._names)])

    def parameters(self) -> list[Any] | None:
        """All parameters (None where a module has none of a name), or None when anything has changed."""
        found = self._values(self._parameters)
        return found if self._look(found) == self._before else None

    def hooked(self, idle: Callable[[dict], bool]) -> bool:
        """Whether a module below carries a forward or backward hook that is not ``idle``."""
        return any(self._hooks) and not all(idle(hooks) for hooks in self._hooks if hooks)
