"""Adapters for other people's Vision Transformers, one file per library.

An adapter is a module with ``plan(module, options)``: a :class:`Plan` that binds a fused forward, a sentence that says
why this module is left alone, or None for a module it knows nothing about.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..parts import BlockParts


@dataclass(frozen=True)
class Options:
    """Which parts ``accelerate`` may fuse."""

    attention: bool = True
    layer_norm: bool = True
    mlp: bool = True
    patch_embed: bool = True


@dataclass(frozen=True)
class Plan:
    """A fused forward for one module.

    forward: called as ``forward(module, *args, **kwargs)``; a module-level function or method, so that it pickles.
    ops: the operators it calls.
    whole: it computes what the module's children would, so those are not planned on their own.
    parts: the reader of a block's parts (see ``fastvit.parts``).
    """

    forward: Callable[..., Any]
    ops: tuple[str, ...]
    whole: bool = False
    parts: Callable[[Any], BlockParts] | None = None


# library -> adapter; an adapter is imported only when its library already is
ADAPTERS = {"timm": "fastvit.integrations.timm"}
