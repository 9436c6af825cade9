"""Positions of tokens: the kinds of the paper's ablation (arXiv 2010.11929, appendix D.4), and their resizing.

"learn": the paper's own 1-dimensional positions: a learned row for each token in raster order, added to z₀ (its
    equation 1).
"2d": an X- and a Y-embedding of D/2 columns; the patch in column x and row y is given [X_x; Y_y]. Prefix tokens are
    given none, as they are learned themselves.
"relative": learned keys r of each layer, one for each distance between two tokens of the sequence, prefix tokens
    included. The logits of query i and key j are q_i · (k_j + r_{i-j}) / √E.
"none": a bag of patches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .config import ViTConfig
from .resample import WAYS, resample_positions

Grid = tuple[int, int]

TABLES = ("pos_embed", "pos_embed_x", "pos_embed_y")


def position_tables(config: ViTConfig, grid: Grid, **factory: Any) -> dict[str, nn.Parameter | None]:
    """The tables of a model of this grid (height, width), by the names of its parameters, None where it has none.

    "learn": pos_embed (1, prefix + N, D), or (1, N, D) with ``no_embed_class``. "2d": pos_embed_x (1, width, D/2),
    pos_embed_y (1, height, D/2). ``factory``: device and dtype.
    """
    rows = dict.fromkeys(TABLES, 0)
    width = config.embed_dim
    if config.pos_embed == "learn":
        rows["pos_embed"] = grid[0] * grid[1] + embedded_prefix(config)
    elif config.pos_embed == "2d":
        rows["pos_embed_y"], rows["pos_embed_x"] = grid
        width //= 2
    return {name: nn.Parameter(torch.zeros(1, n, width, **factory)) if n else None for name, n in rows.items()}


def embedded_prefix(config: ViTConfig) -> int:
    """How many rows of a table belong to prefix tokens."""
    return 0 if config.no_embed_class else config.prefix_tokens


def check_resize(config: ViTConfig, old: Grid, new: Grid, way: str) -> None:
    """Raise ValueError unless positions of one grid can become those of another."""
    if way not in WAYS:
        raise ValueError(f"fastvit: pos_resize must be one of {tuple(WAYS)}, got {way!r}")
    if min(new) < 1:
        raise ValueError("fastvit: img_size must hold at least one patch")
    if config.pos_embed == "relative" and old != new:
        raise ValueError(
            f"fastvit: relative positions are distances in a sequence of {old[0]} x {old[1]} patches and mean others "
            f"in {new[0]} x {new[1]}: they are not resized"
        )


def resized_tables(
    config: ViTConfig, tables: dict[str, Tensor | None], new: Grid, old: Grid, way: str
) -> dict[str, Tensor | None]:
    """The tables for another grid: a 2-D one in 2-D (paper, section 3.2), X and Y in 1-D, by a way of ``WAYS``."""
    check_resize(config, old, new, way)
    if new == old:
        return tables
    grids = {
        "pos_embed": (new, old, embedded_prefix(config)),
        "pos_embed_x": ((1, new[1]), (1, old[1]), 0),
        "pos_embed_y": ((1, new[0]), (1, old[0]), 0),
    }
    return {
        name: None if table is None else resample_positions(table, *grids[name], **WAYS[way])
        for name, table in tables.items()
    }


def added_positions(
    config: ViTConfig, tables: dict[str, Tensor | None], new: Grid, old: Grid, way: str
) -> Tensor | None:
    """What is added to the tokens of a grid ``new``: rows (1, prefix + N, D) or (1, N, D) as the op takes them."""
    tables = resized_tables(config, tables, new, old, way)
    x, y = tables["pos_embed_x"], tables["pos_embed_y"]
    if x is None or y is None:
        return tables["pos_embed"]
    height, width = new
    return torch.cat([x.repeat(1, height, 1), y.repeat_interleave(width, 1)], -1)


def relative_logits(q: Tensor, keys: Tensor, scale: float, rows: list[int] | slice = slice(None)) -> Tensor:
    """The logits scale · q_i · r_{i-j}, which come to those of the tokens themselves before the softmax.

    Plain PyTorch: it takes a second N × N product and holds its result, so that attention with relative positions is
    slower than without, and trains by the reference.

    Args:
        q: (B, H, Q, E), queries as the scores take them.
        keys: r (2·N - 1, E), shared by the heads; row i - j + N - 1 holds r_{i-j}.
        rows: which of the N tokens the queries are.

    Returns:
        (B, H, Q, N).

    Raises:
        ValueError: another number of queries than ``keys`` and ``rows`` are for.
    """
    tokens = (keys.shape[0] + 1) // 2
    place = torch.arange(tokens, device=q.device)
    query = place[rows]
    if query.shape[0] != q.shape[-2]:
        raise ValueError(f"fastvit: relative positions are learned for {tokens} tokens, got {q.shape[-2]}")
    every = q @ keys.to(q.dtype).mT * scale
    return every.gather(-1, (query[:, None] - place + tokens - 1).expand(*q.shape[:-1], -1))
