"""fastvit makes Vision Transformers fast without changing what they compute."""

from . import analysis, ops
from .backends import BackendError, backend, is_available
from .config import PRESETS, ViTConfig
from .cuda_graph import graph
from .drop_in import accelerate, accelerated, report, restore
from .maps import attention_maps
from .model import VisionTransformer, create_model, list_models
from .ops import why_not
from .quantization import quantize

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BackendError",
    "ViTConfig",
    "VisionTransformer",
    "accelerate",
    "accelerated",
    "analysis",
    "attention_maps",
    "backend",
    "create_model",
    "graph",
    "is_available",
    "list_models",
    "ops",
    "quantize",
    "report",
    "restore",
    "why_not",
]
