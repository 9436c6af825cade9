"""Adapters for other people's Vision Transformers, one file per library.

An adapter is a module with ``plan(module, options, parent)``: a :class:`Plan` that binds a fused forward, a sentence
that says why this module is left alone, or None for a module it knows nothing about. It may have
``attention_of(module)``, too: how to read a block's attention even where the block cannot be fused, an
:class:`Attended` or None.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..parts import AttentionParts, BlockParts, Norm


@dataclass(frozen=True)
class Options:
    """Which parts ``accelerate`` may fuse."""

    attention: bool = True
    layer_norm: bool = True
    mlp: bool = True
    patch_embed: bool = True


class BlockCall(NamedTuple):
    """A block's call: tokens (B, N, D); mask and causality, as the ops take them; what turns queries and keys."""

    x: Tensor
    mask: Tensor | None = None
    causal: bool = False
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Plan:
    """A fused forward for one module.

    forward: called as ``forward(module, *args, **kwargs)``; a module-level function or method, so that it pickles.
    ops: the operators it calls.
    whole: it computes what the module's children would, so those are not planned on their own.
    parts: the reader of a block's parts (see ``fastvit.parts``).
    call: what a call of the block means, from the block and the call's arguments.
    """

    forward: Callable[..., Any]
    ops: tuple[str, ...]
    whole: bool = False
    parts: Callable[[Any], BlockParts] | None = None
    call: Callable[..., "BlockCall | None"] | None = None


class Attended(NamedTuple):
    """A block's attention.

    parts: reads the norm in front of it, None where there is none, and itself, off the block.
    call: as in :class:`Plan`; None: a block is called as timm's are, ``(x, attn_mask=None, is_causal=False)``.
    """

    parts: Callable[[Any], tuple[Norm | None, AttentionParts]]
    call: Callable[..., BlockCall | None] | None = None


# library -> adapter; an adapter is imported only when its library already is
ADAPTERS = {name: f"fastvit.integrations.{name}" for name in ("timm", "transformers", "torchvision")}


def loaded() -> Iterator[Any]:
    """The adapters of the libraries that are imported."""
    for library, adapter in ADAPTERS.items():
        if library in sys.modules:
            yield importlib.import_module(adapter)


def __getattr__(name: str) -> Any:
    """A module of this package, imported when it is asked for: ``fastvit.integrations.transformers.register()``."""
    if name in (*ADAPTERS, "hf_kernels", "pytorch"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
