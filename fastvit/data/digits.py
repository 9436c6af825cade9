"""scikit-learn's handwritten digits: 1797 real images that a package brings along."""

import torch
from torch.nn import functional

from .source import InMemory
from .split import stratified


def digits(split: str) -> InMemory:
    """The digits as grey images of 32 x 32 in RGB; a fifth of every class is the test set.

    The 8 x 8 pixels of 0 to 16 are enlarged bilinearly and scaled to 0 to 255.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise ImportError(
            f"fastvit.data: digits need scikit-learn ({missing}); install it with: pip install scikit-learn",
            name=missing.name,
        ) from None
    found = load_digits()
    small = torch.from_numpy(found.images)[:, None].float() * (255 / 16)  # (N, 1, 8, 8)
    grey = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(found.target).long()
    mine = torch.tensor(stratified(labels.tolist(), [str(number) for number in range(len(labels))], split))
    images = grey.round().to(torch.uint8)[mine].expand(-1, 3, -1, -1).contiguous()
    return InMemory("digits", [str(digit) for digit in found.target_names], images, labels[mine])
