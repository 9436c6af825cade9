"""Weights of every known layout: read safely, translated by way of timm's names, resized, loaded or written.

files, npz, pickled read headers and data; timm, transformers, torchvision, openai and jax say where a library keeps
what; layout and convert translate; positions resizes; load and write are what a user calls.
"""

from .convert import convert_state_dict
from .error import CheckpointError
from .load import load_checkpoint
from .write import convert_file

__all__ = ["CheckpointError", "convert_file", "convert_state_dict", "load_checkpoint"]
