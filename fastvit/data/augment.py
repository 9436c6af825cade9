"""What happens to images before a model sees them: all of it on uint8, each image by its own random numbers."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .source import DataError

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
MAX_PIXELS = 50_000_000  # of an image on its way to the model's size
RESAMPLE = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed; evaluation leaves them as they are.

    crop_scale: the least and the largest share of the image's area that a random resized crop keeps, its aspect ratio
        between 3/4 and 4/3 (Szegedy et al. 2015, Inception crops); None resizes the whole image.
    flip: half of the images are mirrored.
    shift: the image is padded by so many black pixels on each side, and a window of its size is cut out at random.
    mixup: alpha of mixup (Zhang et al. 2017): x ← λ x + (1 - λ) x', targets alike, λ ~ Beta(alpha, alpha); 0 is off.
    cutmix: alpha of CutMix (Yun et al. 2019): a box of the share 1 - λ comes from x'; 0 is off. With both, each batch
        takes one or the other with equal chances.

    Raises:
        ValueError: a number outside of its range.
    """

    crop_scale: tuple[float, float] | None = None
    flip: bool = False
    shift: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_scale is not None:
            low, high = self.crop_scale
            if not 0 < low <= high <= 1:
                raise ValueError(f"fastvit.data: crop_scale must be 0 < low <= high <= 1, got {self.crop_scale!r}")
        if self.shift < 0:
            raise ValueError(f"fastvit.data: shift must be at least 0 pixels, got {self.shift!r}")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"fastvit.data: {name} must be a finite number of at least 0, got {getattr(self, name)!r}"
                )


def resized(images: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    """Images (B, C, h, w), uint8, at (height, width), antialiased."""
    if tuple(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images, size=size, mode=resample, align_corners=False, antialias=True)


def centred(images: Tensor, size: tuple[int, int], crop_pct: float, resample: str) -> Tensor:
    """Images (B, C, h, w) as timm evaluates them: the shorter side resized to size / crop_pct, then a centre crop.

    Images of the wanted size stay as they are. Where `size` is no square, the image is resized to cover it.

    Raises:
        DataError: an image so elongated that it would grow beyond 50 million pixels.
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    target = math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct)
    if target[0] == target[1]:
        side = target[0]
        whole = (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
    else:
        ratio = min(height / target[0], width / target[1])
        whole = max(round(height / ratio), size[0]), max(round(width / ratio), size[1])
    if math.prod(whole) > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are too elongated to be resized")
    images = resized(images, whole, resample)
    top, left = round((whole[0] - size[0]) / 2), round((whole[1] - size[1]) / 2)
    return images[..., top : top + size[0], left : left + size[1]]


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """The top, the left, the height and the width of a random resized crop, drawn as torchvision and timm do.

    The area's share is uniform, the aspect ratio log-uniform; where ten attempts do not fit, the largest centre crop of
    an allowed aspect ratio.
    """
    for _ in range(ATTEMPTS):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1)), high, wide
    wide = min(width, max(1, round(height * RATIO[1])))
    high = min(height, max(1, round(width / RATIO[0])))
    return (height - high) // 2, (width - wide) // 2, high, wide


def moved(images: Tensor, draws: np.ndarray, flip: bool, shift: int) -> Tensor:
    """Images (B, C, height, width), each mirrored or not and shifted, by its three numbers in 0 .. 1.

    Args:
        draws: (B, 3): mirrored below 1/2, the window's top and its left.
    """
    numbers = torch.from_numpy(draws)
    if flip:
        images = torch.where(numbers[:, 0, None, None, None] < 0.5, images.flip(-1), images)
    if shift:
        height, width = images.shape[-2:]
        top, left = (numbers[:, 1:] * (2 * shift + 1)).long().unbind(1)
        padded = functional.pad(images, (shift, shift, shift, shift))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 shift + 1, 2 shift + 1, height, width)
        images = windows[torch.arange(len(images)), :, top, left]
    return images
