"""Position tables for another grid, resized as the library does that they come from."""

import math

from torch import Tensor

from ..resample import WAYS, resample_positions
from .error import CheckpointError
from .layout import Translated, added, joined

PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


def fit_positions(
    found: Translated,
    goal: dict[str, Tensor],
    grid: tuple[int, int] | None,
    way: str,
    source_grid: tuple[int, int] | None = None,
) -> None:
    """Make the table of ``found`` (timm's names) one for the model whose tensors are ``goal``.

    Rows of prefix tokens that the model has no positions for are added to the tokens, and zero rows stand for positions
    that the checkpoint lacks: both leave every logit as it was.

    Raises:
        CheckpointError: the grid of the checkpoint is not known, or not unique.
    """
    table, wanted = found.tensors.get("pos_embed"), goal.get("pos_embed")
    if table is None or wanted is None or table.dim() != 3 or table.shape[-1] != wanted.shape[-1] or grid is None:
        return
    prefix = sum(found.tensors[name].shape[1] for name in PREFIX_TOKENS if name in found.tensors)
    goal_prefix = wanted.shape[1] - grid[0] * grid[1]
    own_prefix, old = _grid_of(table.shape[1], prefix, goal_prefix, grid, source_grid)
    if old != grid:
        if table.is_meta:
            table = table.new_empty(1, own_prefix + grid[0] * grid[1], table.shape[-1])
        else:
            table = resample_positions(table, grid, old, own_prefix, **WAYS[way])
    if own_prefix and not goal_prefix:
        _fold(found, table[:, :own_prefix])
        table = table[:, own_prefix:]
    elif goal_prefix == prefix and not own_prefix:
        table = joined([table.new_zeros(1, prefix, table.shape[-1]), table], 1)
    found.tensors["pos_embed"] = table


def _fold(found: Translated, rows: Tensor) -> None:
    names = [name for name in PREFIX_TOKENS if name in found.tensors]
    for name, own in zip(names, rows.split([found.tensors[name].shape[1] for name in names], 1), strict=True):
        found.tensors[name] = added(found.tensors[name], own)
        found.origin[name] += found.origin["pos_embed"]


def _grid_of(
    rows: int, prefix: int, goal_prefix: int, grid: tuple[int, int], source_grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    """How many rows of a table belong to prefix tokens, and the grid of the rest."""
    possible = [n for n in dict.fromkeys((goal_prefix, prefix, 0)) if n in (0, prefix) and rows > n]
    if source_grid is not None:
        for n in possible:
            if rows - n == source_grid[0] * source_grid[1]:
                return n, source_grid
        raise CheckpointError(f"fastvit: source_grid {source_grid} does not fit a position table of {rows} rows")
    for n in possible:
        side = math.isqrt(rows - n)
        if rows - n == grid[0] * grid[1]:
            if side * side == rows - n and grid[0] != grid[1]:
                raise CheckpointError(
                    f"fastvit: a table of {rows - n} positions may be {side} x {side} or, as in the model, "
                    f"{grid[0]} x {grid[1]}: say which with source_grid=({side}, {side}) or source_grid={grid}"
                )
            return n, grid
    for n in possible:
        side = math.isqrt(rows - n)
        if side * side == rows - n:
            return n, (side, side)
    raise CheckpointError(f"fastvit: a position table of {rows} rows is no square: say source_grid=(height, width)")
