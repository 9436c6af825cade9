"""Photographs to measure with, as one batch."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvit.images import ImageError, Preprocessing

_SHOWN = 5


def photographs() -> list[Path]:
    """The two photographs that scikit-learn ships (`china.jpg`, `flower.jpg`, CC-BY).

    Raises:
        ImageError: scikit-learn, which carries them, is not installed.
    """
    spec = importlib.util.find_spec("sklearn")  # found, not imported: importing it costs a second
    if spec is None or spec.origin is None:
        raise ImageError(
            'no default photographs: install them with  pip install "fastvit[bench]"  or pass --images DIR'
        )
    folder = Path(spec.origin).parent / "datasets" / "images"
    paths = [folder / "china.jpg", folder / "flower.jpg"]
    if not all(path.is_file() for path in paths):
        raise ImageError(f"scikit-learn's photographs are missing in {folder}: pass --images DIR")
    return paths


def load(
    paths: Sequence[Path], size: int, crop_pct: float, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Read, resize, crop and normalise image files as timm's eval transform does.

    Args:
        paths: image files.
        size: side of the square the model sees, in pixels.
        crop_pct: share of the resized image's shorter side that the crop keeps.
        mean, std: three numbers each, for pixels in 0..1.

    Returns:
        fp32 (len(paths), 3, size, size).

    Raises:
        ImageError: one line for each file that cannot be read.
    """
    prepare = Preprocessing.of_timm(size, crop_pct, mean, std)
    pixels, failures = [], []
    for path in paths:
        try:
            pixels.append(prepare.read(path))
        except ImageError as error:
            failures.append(str(error))
    if failures:
        hidden = len(failures) - _SHOWN
        raise ImageError("\n".join(failures[:_SHOWN] + ([f"... and {hidden} more files"] if hidden > 0 else [])))
    return torch.stack(pixels)
