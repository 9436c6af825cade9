"""What a Vision Transformer learned and looks at: the paper's section 4.5, figures 6, 7 and 11, as numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .integrations.embeddings import Embedding, embedding_of
from .maps import collect, image_grid

Images = Tensor | Mapping[str, Any]


def patch_grid(model: nn.Module, x: Images) -> tuple[int, int]:
    """How many patches along height and width a model makes of images x (B, C, height, width).

    Raises:
        ValueError: the model's embedding is unknown, or x are no images.
    """
    return image_grid(model, x)[1]


def patch_maps(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values of tokens (..., N) as pictures of the patches (..., rows, columns); prefix tokens are left out.

    Raises:
        ValueError: fewer than rows · columns tokens.
    """
    patches = _patches("patch_maps", maps.shape[-1], grid)
    return maps[..., patches].unflatten(-1, tuple(grid))


def attention_rollout(source: nn.Module | Sequence[Tensor], x: Images | None = None, **forward_kwargs: Any) -> Tensor:
    """How much of each input token is in each output token, by attention rollout (Abnar & Zuidema, arXiv 2005.00928).

    With A_l the attention of layer l, averaged over the heads as the paper does (appendix D.8, figures 6 and 14):

        Â_l = ½ A_l + ½ I        rollout = Â_L · ... · Â_2 · Â_1

    Args:
        source: the maps (B, H, N, N) of all layers in order, or a model, whose maps are then taken one by one.
        x: the model's input, images (B, C, height, width) or a mapping of arguments.
        forward_kwargs: for the model's forward.

    Returns:
        (B, N, N) in fp32 (fp64 for maps in fp64). Rows sum to 1; ``rollout[:, 0]`` is the class token's.

    Raises:
        TypeError: neither maps nor a model with x. ValueError: maps of other shapes; what ``attention_maps`` raises.
    """
    rollout: Tensor | None = None

    def follow(_: int, maps: Tensor) -> None:
        nonlocal rollout
        mean = _square("attention_rollout", maps).mean(1)
        if rollout is not None and rollout.shape != mean.shape:
            shapes = f"{tuple(rollout.shape)} and {tuple(mean.shape)}"
            raise ValueError(f"fastvit.attention_rollout: maps of all layers must have the same B and N, got {shapes}")
        step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        rollout = step if rollout is None else step @ rollout

    _each("attention_rollout", source, x, "mean", forward_kwargs, follow)
    assert rollout is not None
    return rollout


def attention_distance(
    source: nn.Module | Sequence[Tensor],
    grid: tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    x: Images | None = None,
    **forward_kwargs: Any,
) -> Tensor:
    """How far each head looks: the mean distance between patches, weighted by attention (paper, figure 7 right).

    With A_ij the attention of patch i to patch j and d_ij the distance of their centres in pixels:

        distance = mean over images and patches i of  Σ_j A_ij d_ij / Σ_j A_ij

    Prefix tokens are neither i nor j. Averaging over many images (the paper takes 128) is the caller's: the mean of the
    results of batches of one size.

    Args:
        source: maps (B, H, N, N) of layers, or a model, whose maps of all layers are then taken one by one.
        grid: (rows, columns) of the patches; of a model's input, if it is not given.
        patch_size: in pixels, or (height, width); the model's, if it is not given.
        x: the model's input, images (B, C, height, width) or a mapping of arguments.
        forward_kwargs: for the model's forward.

    Returns:
        (layers, H) in pixels, fp32 (fp64 for maps in fp64).

    Raises:
        TypeError: neither maps with grid and patch_size nor a model with x. ValueError: maps that do not fit the grid;
            what ``attention_maps`` raises.
    """
    if isinstance(source, nn.Module) and x is None:
        raise TypeError("fastvit.attention_distance: a model needs x=, its input")
    if isinstance(source, nn.Module) and (grid is None or patch_size is None):
        embedding, found = image_grid(source, x)
        grid, patch_size = grid or found, patch_size or embedding.patch_size
    if grid is None or patch_size is None:
        raise TypeError("fastvit.attention_distance: maps need grid=(rows, columns) and patch_size in pixels")
    between = _distances(grid, patch_size)
    found_distances: list[Tensor] = []

    def measure(_: int, maps: Tensor) -> None:
        patches = _patches("attention_distance", maps.shape[-1], grid)
        weights = _square("attention_distance", maps)[:, :, patches, patches]
        total = weights.sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)
        far = (weights * between.to(weights)).sum(-1) / total
        found_distances.append(far.mean((0, 2)))

    _each("attention_distance", source, x, None, forward_kwargs, measure)
    return torch.stack(found_distances)


def pos_embed_similarity(source: nn.Module | Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Cosine similarity of the position embeddings of all pairs of patches (paper, figure 7 centre, figure 10).

        similarity[i, j, k, l] = p_ij · p_kl / (|p_ij| |p_kl|)

    Args:
        source: a model, or a table (rows of it, D) or (1, rows of it, D), those of prefix tokens first.
        grid: (rows, columns) of the patches that the table was made for; a table needs it, a model knows it.

    Returns:
        (rows, columns, rows, columns) in [-1, 1], fp32 (fp64 for a table in fp64).

    Raises:
        TypeError: neither model nor table. ValueError: a model without a table, a table that does not fit the grid.
    """
    if isinstance(source, nn.Module):
        embedding = _embedding("pos_embed_similarity", source)
        table = embedding.positions
        if table is None:
            raise ValueError(f"fastvit.pos_embed_similarity: {type(source).__name__} has no table of positions")
        grid = grid or embedding.grid or _square_grid(table.shape[0], embedding.prefix)
    elif isinstance(source, Tensor):
        table = source[0] if source.dim() == 3 and source.shape[0] == 1 else source
    else:
        raise TypeError(f"fastvit.pos_embed_similarity: expected a model or a table, got {type(source).__name__}")
    if table.dim() != 2 or grid is None:
        raise ValueError(
            "fastvit.pos_embed_similarity: a table must be (rows, D) or (1, rows, D) and comes with grid=(rows, "
            f"columns), got {tuple(table.shape)} and grid={grid}"
        )
    table = table.detach()[_patches("pos_embed_similarity", table.shape[0], grid)]
    unit = F.normalize(table.to(torch.promote_types(table.dtype, torch.float32)), dim=-1)
    return (unit @ unit.T).clamp(-1.0, 1.0).view(*grid, *grid)


def embedding_filters(model: nn.Module, n: int = 28) -> Tensor:
    """The first principal components of the filters that project patches (paper, section 4.5, figure 7 left).

    The D filters are points in the space of patches; their components, by falling variance, are unit vectors there,
    drawn with the largest magnitude positive and each stretched to [0, 1].

    Args:
        model: whose projection of patches is a convolution of pixels.
        n: how many, at most min(D, C·P·Q).

    Returns:
        (n, C, P, Q) fp32 on the CPU, in [0, 1].

    Raises:
        ValueError: no projection of pixels, or n out of range.
    """
    weight = _embedding("embedding_filters", model).weight
    if weight is None:
        raise ValueError(f"fastvit.embedding_filters: {type(model).__name__} does not project patches of pixels")
    filters = weight.detach().double().cpu().flatten(1)
    most = min(filters.shape)
    if not isinstance(n, int) or not 1 <= n <= most:
        raise ValueError(f"fastvit.embedding_filters: n must be in 1..{most}, got {n!r}")
    components = torch.linalg.svd(filters - filters.mean(0), full_matrices=False).Vh[:n]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    low, high = components.amin(1, keepdim=True), components.amax(1, keepdim=True)
    return ((components - low) / (high - low)).float().view(n, *weight.shape[1:])


def _each(function: str, source: Any, x: Any, heads: Any, forward_kwargs: Any, take: Any) -> None:
    """``take(layer, maps)`` for maps that are given, or those of a model while it runs."""
    if isinstance(source, nn.Module):
        if x is None:
            raise TypeError(f"fastvit.{function}: a model needs x, its input")
        collect(source, x, None, "all", heads, False, forward_kwargs, take)
        return
    if isinstance(source, Tensor) or not isinstance(source, Sequence) or not source:
        raise TypeError(f"fastvit.{function}: expected maps of layers or a model, got {type(source).__name__}")
    for layer, maps in enumerate(source):
        take(layer, maps)


def _square(function: str, maps: Any) -> Tensor:
    if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.shape[-1] != maps.shape[-2]:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(
            f"fastvit.{function}: maps must be (B, H, N, N), as attention_maps(..., queries='all') gives, got {given}"
        )
    return maps


def _patches(function: str, tokens: int, grid: Any) -> slice:
    """Where the patches of a grid are among tokens."""
    sizes = isinstance(grid, Sequence) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
    if not sizes or tokens < grid[0] * grid[1]:
        raise ValueError(f"fastvit.{function}: grid must be (rows, columns) of at most {tokens} patches, got {grid!r}")
    return slice(tokens - grid[0] * grid[1], None)


def _distances(grid: tuple[int, int], patch_size: int | tuple[int, int]) -> Tensor:
    """(rows·columns, rows·columns) distances of the centres of patches in pixels."""
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(
            f"fastvit.attention_distance: patch_size must be pixels or (height, width) of them, got {patch_size!r}"
        )
    p, q = sides
    y, x = torch.meshgrid(torch.arange(grid[0]) * p, torch.arange(grid[1]) * q, indexing="ij")
    centres = torch.stack([y.flatten(), x.flatten()], -1).double()
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def _embedding(function: str, model: Any) -> Embedding:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvit.{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    found = embedding_of(model)
    if found is None:
        raise ValueError(f"fastvit.{function}: found no embedding of images, or several, in {type(model).__name__}")
    return found


def _square_grid(rows: int, prefix: int) -> tuple[int, int] | None:
    """The square that a table's rows are for, with or without rows of prefix tokens."""
    for patches in (rows - prefix, rows - 1, rows):
        side = math.isqrt(max(0, patches))
        if side and side * side == patches:
            return side, side
    return None
