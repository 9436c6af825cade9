"""fastvit makes Vision Transformers fast without changing what they compute."""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops
from .backends import BackendError, backend, is_available
from .config import PRESETS, ViTConfig
from .cuda_graph import graph
from .drop_in import accelerate, accelerated, report, restore
from .model import VisionTransformer, create_model, list_models
from .ops import why_not
from .quantization import quantize

if TYPE_CHECKING:
    from . import analysis
    from .checkpoints import CheckpointError, convert_file, convert_state_dict, load_checkpoint
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


# what no forward pass needs is imported when it is asked for
_LATER = {
    "analysis": "analysis",
    "attention_maps": "maps",
    **dict.fromkeys(("CheckpointError", "convert_file", "convert_state_dict", "load_checkpoint"), "checkpoints"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)
