"""Sources of labelled images, and the uint8 batches that training and evaluation make of them."""

try:
    import numpy  # noqa: F401
except ImportError as missing:
    raise ImportError(
        f'fastvit.data: data need numpy ({missing}); install it with: pip install "fastvit[cli]"', name=missing.name
    ) from None

from .augment import Augmentation
from .batches import Batches
from .places import open_source
from .source import DataError, InMemory, Source

__all__ = ["Augmentation", "Batches", "DataError", "InMemory", "Source", "open_source"]
