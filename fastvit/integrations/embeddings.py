"""How a Vision Transformer of any library turns an image to tokens, by the names that the library gives the parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Embedding(NamedTuple):
    """An image (B, C, height, width) to prefix tokens and one token for each patch, row by row.

    weight: the projection of patches (D, C, P, Q); None where it does not project pixels.
    patch_size: (P, Q) in pixels.
    prefix: how many tokens stand in front of the patches. class_token: the first of them is one.
    positions: (rows of the table, D), those of prefix tokens first; None where there is no table.
    grid: the patches along height and width that the table was made for; None for a square.
    grid_at: the patches of an image of (height, width), where that is more than a division by patch_size.
    """

    weight: Tensor | None
    patch_size: tuple[int, int]
    prefix: int
    class_token: bool
    positions: Tensor | None
    grid: tuple[int, int] | None
    grid_at: Callable[[tuple[int, int]], tuple[int, int]] | None = None

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Patches along height and width of an image of this size."""
        if self.grid_at is not None:
            return self.grid_at((height, width))
        return height // self.patch_size[0], width // self.patch_size[1]


def embedding_of(model: nn.Module) -> Embedding | None:
    """The embedding of images in a model, or None where there is none that is known, or more than one."""
    readers: tuple[Callable[[Any], Embedding | None], ...] = (_timm, _torchvision, _transformers)
    found = [one for module in model.modules() for reader in readers if (one := reader(module)) is not None]
    return found[0] if len(found) == 1 else None


def _timm(model: Any) -> Embedding | None:
    """timm's VisionTransformer and Eva, and ours."""
    embed, prefix = _child(model, "patch_embed"), getattr(model, "num_prefix_tokens", None)
    proj = getattr(embed, "proj", None)
    if not isinstance(proj, nn.Conv2d) or not isinstance(prefix, int):
        return None
    hybrid = hasattr(embed, "backbone")
    patch_size = embed.feat_ratio(as_scalar=False) if hybrid else embed.patch_size
    return Embedding(
        None if hybrid else proj.weight,
        tuple(patch_size),
        prefix,
        getattr(model, "cls_token", None) is not None,
        _table(getattr(model, "pos_embed", None)),
        getattr(embed, "grid_size", None),
        embed.dynamic_feat_size if hybrid else None,
    )


def _torchvision(model: Any) -> Embedding | None:
    """torchvision's VisionTransformer."""
    proj, encoder = _child(model, "conv_proj"), _child(model, "encoder")
    if proj is None or not hasattr(encoder, "pos_embedding"):
        return None
    weight = proj.weight if isinstance(proj, nn.Conv2d) else None
    return Embedding(weight, (model.patch_size,) * 2, 1, True, _table(encoder.pos_embedding), None)


def _transformers(module: Any) -> Embedding | None:
    """The embeddings modules of transformers' ViT, DeiT, DINOv2, DINOv3, BEiT, MAE, I-JEPA, CLIP, SigLIP, ..."""
    proj, grid = _child(module, "patch_embeddings") or _child(module, "patch_embedding"), None
    if isinstance(getattr(proj, "projection", None), nn.Conv2d):
        side, patch = getattr(proj, "image_size", None), getattr(proj, "patch_size", None)
        if isinstance(side, (tuple, list)) and isinstance(patch, (tuple, list)):
            grid = (side[0] // patch[0], side[1] // patch[1])
        proj = proj.projection
    if not isinstance(proj, nn.Conv2d):
        return None
    names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    tokens = {name: t for name in names if isinstance(t := getattr(module, name, None), Tensor)}
    positions = getattr(module, "position_embeddings", getattr(module, "position_embedding", None))
    return Embedding(
        proj.weight,
        (proj.kernel_size[0], proj.kernel_size[1]),
        sum(1 if t.dim() < 3 else t.shape[1] for t in tokens.values()),
        "cls_token" in tokens or "class_embedding" in tokens,
        _table(positions.weight if isinstance(positions, nn.Embedding) else positions),
        grid,
    )


def _child(module: nn.Module, name: str) -> Any:
    """A module's own child: wrappers pass attributes on, which would be found twice."""
    return module._modules.get(name)


def _table(positions: Any) -> Tensor | None:
    """(rows, D) of a table with or without a batch dimension."""
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        return None
    return positions[0] if positions.dim() == 3 else positions
