"""transformers: ``register()`` makes ``attn_implementation="fastvit"`` known to its models, masks included."""

from .attention_interface import register

__all__ = ["register"]
