"""The one exception of this package, and lists of names that stay short."""

from collections.abc import Iterable

from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted, is of no known layout or does not fit; nothing has been changed."""


def shortened(names: Iterable[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= 120 else f"{name[:117]}..." for name in names[:most]) + rest


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
