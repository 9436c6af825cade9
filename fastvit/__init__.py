"""fastvit makes Vision Transformers fast without changing what they compute."""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops
from .backends import BackendError, backend, is_available
from .checkpoints import CheckpointError, convert_file, convert_state_dict, load_checkpoint
from .config import PRESETS, ViTConfig
from .cuda_graph import graph
from .drop_in import accelerate, accelerated, report, restore
from .model import VisionTransformer, create_model, list_models
from .ops import why_not
from .quantization import quantize

if TYPE_CHECKING:
    from . import analysis
    from .maps import attention_maps

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BackendError",
    "CheckpointError",
    "ViTConfig",
    "VisionTransformer",
    "accelerate",
    "accelerated",
    "analysis",
    "attention_maps",
    "backend",
    "convert_file",
    "convert_state_dict",
    "create_model",
    "graph",
    "is_available",
    "list_models",
    "load_checkpoint",
    "ops",
    "quantize",
    "report",
    "restore",
    "why_not",
]


def __getattr__(name: str) -> Any:
    """What no forward pass needs is imported when it is asked for."""
    if name == "analysis":
        return importlib.import_module(f"{__name__}.analysis")
    if name == "attention_maps":
        return importlib.import_module(f"{__name__}.maps").attention_maps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
