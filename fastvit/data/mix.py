"""mixup and CutMix of a batch with itself in reverse order, on uint8."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .augment import Augmentation


@dataclass(frozen=True)
class Mix:
    """What one batch is mixed by: x ← λ x + (1 - λ) x.flip(0), or the box (top, bottom, left, right) of x.flip(0)."""

    lam: float
    box: tuple[int, int, int, int] | None = None

    def __call__(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Mixed images, uint8 (B, C, height, width), and targets, fp32 (B, K) of which each row sums to 1."""
        if self.box is None:
            whole = images.float()
            images = (whole * self.lam + whole.flip(0) * (1 - self.lam)).round_().to(torch.uint8)
        else:
            top, bottom, left, right = self.box
            partner, images = images.flip(0), images.clone()
            images[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        targets = functional.one_hot(labels, classes).float()
        return images, self.lam * targets + (1 - self.lam) * targets.flip(0)


def draw(augmentation: Augmentation, size: tuple[int, int], rng: np.random.Generator) -> Mix | None:
    """How to mix the next batch of images of `size`; None where neither mixup nor CutMix is on.

    CutMix's box has sqrt(1 - λ) of each side and its centre anywhere; where the border cuts it, λ becomes the share
    that is left of the image, as in its authors' code.
    """
    if not (augmentation.mixup or augmentation.cutmix):
        return None
    cut = augmentation.cutmix > 0 and (augmentation.mixup == 0 or rng.random() < 0.5)
    alpha = augmentation.cutmix if cut else augmentation.mixup
    lam = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(lam)
    sides = []
    for side in size:
        length, centre = int(side * np.sqrt(1 - lam)), int(rng.integers(side))
        sides.append((max(centre - length // 2, 0), min(centre - length // 2 + length, side)))
    (top, bottom), (left, right) = sides
    return Mix(1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right))
