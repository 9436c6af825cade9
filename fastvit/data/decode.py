"""Image files, and images that lie inside other files, as tensors."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fastvit.images import ImageError, read_rgb

from .source import DataError


class _Encoded(io.BytesIO):
    """The bytes of an image under a name: as much of a path as :func:`fastvit.images.read_rgb` asks for."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name, self._size = name, len(data)

    def __str__(self) -> str:
        return self._name

    def is_file(self) -> bool:
        return True

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self._size)


def decoded(path: Path) -> Tensor:
    """The image in a file, uint8 (3, height, width), upright, by the rules of :func:`fastvit.images.read_rgb`.

    Raises:
        DataError: it cannot be read, and why.
    """
    try:
        return torch.from_numpy(np.array(read_rgb(path))).permute(2, 0, 1)
    except ImageError as error:
        raise DataError(str(error)) from None


def decoded_bytes(data: bytes, name: str) -> Tensor:
    """The image in the bytes of a file, as above; errors begin with `name`."""
    return decoded(cast(Path, _Encoded(data, name)))
