"""Position tables and patch projections at another size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# how each library interpolates; "npz" is timm's choice for the original's files, "original" SciPy's zoom of order 1,
# which google-research/vision_transformer calls
WAYS: dict[str, dict] = {
    "timm": {"interpolation": "bicubic", "antialias": True},
    "transformers": {"interpolation": "bicubic", "antialias": False, "align_corners": False},
    "torchvision": {"interpolation": "bicubic", "antialias": False, "align_corners": True},
    "dinov2": {"interpolation": "bicubic", "antialias": False, "offset": 0.1},
    "npz": {"interpolation": "bilinear", "antialias": False},
    "original": {"interpolation": "bilinear", "antialias": False, "align_corners": True},
}


def resample_positions(
    table: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    offset: float = 0.0,
) -> Tensor:
    """Interpolate a position table in 2-D, as timm does (paper, section 3.2); prefix rows stay as they are.

    Args:
        table: (1, prefix + old height·width, D).
        new_grid, old_grid: (height, width) in patches; None assumes a square old grid.
        interpolation, antialias, align_corners: as in torch.nn.functional.interpolate.
        offset: what DINOv2 adds to the new height and width before it takes the scale from them.

    Returns:
        (1, prefix + new height·width, D) in the table's dtype, interpolated in fp32.
    """
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    if old_grid is None:
        side = math.isqrt(patches.shape[1])
        old_grid = (side, side)
    if old_grid == new_grid:
        return table
    image = patches.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    scale = [(new + offset) / old for new, old in zip(new_grid, old_grid, strict=True)] if offset else None
    image = F.interpolate(
        image,
        size=None if scale else new_grid,
        scale_factor=scale,
        mode=interpolation,
        align_corners=align_corners,
        antialias=antialias,
    )
    patches = image.permute(0, 2, 3, 1).reshape(1, -1, table.shape[-1]).to(table.dtype)
    return torch.cat([prefix, patches], dim=1)


def resample_patch_weight(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The projection for another patch size that keeps the tokens of resized patches (FlexiViT, arXiv 2212.08013).

    With R the matrix of the bicubic resize from old to new patches, the new weight is pinv(Rᵀ) applied to the old one.

    Args:
        weight: (D, C, P, Q).

    Returns:
        (D, C, *patch_size) in the weight's dtype.
    """
    old = (int(weight.shape[2]), int(weight.shape[3]))
    if old == patch_size:
        return weight
    basis = torch.eye(old[0] * old[1], dtype=torch.float64, device=weight.device).view(-1, 1, *old)
    resize = F.interpolate(basis, size=patch_size, mode="bicubic", antialias=True).flatten(1).t()
    inverse = torch.linalg.pinv(resize.t())
    return (weight.double().flatten(2) @ inverse.t()).view(*weight.shape[:2], *patch_size).to(weight.dtype)
