"""What a source of labelled images is, the one that lies in memory, and the one exception of this package."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class DataError(ValueError):
    """One line that names the file, what was found in it and what was expected."""


class Source(Protocol):
    """Labelled images behind numbers; what decoding costs is paid in `__getitem__`, in a worker process.

    `source[i]` is an image, uint8 (3, height, width) of any size, and its class, 0 to K - 1; it raises DataError where
    the image cannot be read. A source can be pickled and used after a fork: it keeps no open file.
    """

    @property
    def name(self) -> str:
        """What a log calls it: "cifar10", the folder's name."""
        ...

    @property
    def classes(self) -> list[str]:
        """The names of the K classes."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class InMemory:
    """A source whose images all have one size and lie in one tensor; batches are cut out of it without a loop.

    Args:
        images: uint8 (N, 3, height, width).
        labels: int64 (N,).
    """

    def __init__(self, name: str, classes: Sequence[str], images: Tensor, labels: Tensor) -> None:
        self.name = name
        self.classes = list(classes)
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def check_labels(labels: Tensor, classes: int, where: object) -> None:
    """Refuse a class without a name.

    Raises:
        DataError: the first label outside of 0 to `classes` - 1.
    """
    wrong = torch.nonzero((labels < 0) | (labels >= classes)).flatten()
    if wrong.numel():
        number = int(wrong[0])
        raise DataError(f"{where}: image {number} has label {int(labels[number])}, expected 0 to {classes - 1}")
