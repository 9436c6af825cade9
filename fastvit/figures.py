"""The paper's pictures of what a Vision Transformer learned and looks at, drawn from `fastvit.analysis`' numbers."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMATS = (".png", ".svg", ".pdf")
_GAP = 0.12  # between tiles, as a share of their side


class FigureError(ValueError):
    """Nothing can be drawn, or not to that file."""


def check_target(path: str | Path) -> Path:
    """Check before any work that a figure can be written to this path.

    Raises:
        FigureError: matplotlib is missing, the suffix is none of png, svg, pdf, the path is a directory, or lies
            where nothing can be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise FigureError(f"{path}: a figure is written as {', '.join(FORMATS)}")
    if path.is_dir():
        raise FigureError(f"{path}: a directory, not a file to write")
    check_folder(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FigureError('figures need matplotlib:  pip install "fastvit[bench]"') from None
    return path


def check_folder(path: str | Path) -> None:
    """Check that something can be written to this path: it, or the nearest folder above it that exists, is writable.

    Raises:
        FigureError: that is no folder, or not one for this user.
    """
    path = Path(path)
    folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if folder == path.absolute() and not folder.is_dir():  # a file that will be replaced
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise FigureError(f"{path}: {folder} is no directory that can be written to")


def save(figure: Any, path: str | Path, dpi: int = 160, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a matplotlib figure in one step: the file is whole or what it was before.

    ``metadata``: what the file says about itself, in a PNG as text chunks.
    """
    path = check_target(path)
    with in_one_step(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata=dict(metadata or {}))
    return path


@contextlib.contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A file to write beside the path, in a folder made where it is missing; it takes the path's place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def blank(width: float, height: float) -> Any:
    """An empty matplotlib figure of that size in inches, tied to no window and to no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def overlay(picture: Tensor, weights: Tensor) -> Tensor:
    """A picture darkened where little attention goes, as in figure 6: picture · weights / max(weights).

    Args:
        picture: (height, width, 3) in [0, 1].
        weights: (rows, columns) of the patches, resized bilinearly.

    Returns:
        (height, width, 3) in [0, 1], fp32.
    """
    grid = weights.float()[None, None] / weights.max().clamp_min(torch.finfo(torch.float32).tiny)
    resized = torch.nn.functional.interpolate(grid, picture.shape[:2], mode="bilinear", align_corners=False)
    return picture * resized[0, 0, :, :, None]


def attention(
    pictures: Sequence[Tensor],
    weights: Sequence[Tensor],
    title: str,
    patch: tuple[int, int] | None = None,
    pairs: int = 1,
) -> Any:
    """Figures 6 and 14: each picture (height, width, 3) in [0, 1] beside itself under its weights (rows, columns).

    ``patch`` (row, column) gets a frame. ``pairs``: how many stand side by side.
    """
    from matplotlib.patches import Rectangle

    pairs = min(pairs, len(pictures))
    rows = math.ceil(len(pictures) / pairs)
    side = 2.6 if pairs == 1 else 1.6
    figure = blank(2 * side * pairs, side * rows + 0.4)
    panels = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, picture, weight in zip(panels.reshape(-1, 2), pictures, weights, strict=False):
        for axes, image in zip(row, (picture, overlay(picture, weight)), strict=True):
            axes.imshow(image.numpy(), interpolation="nearest")
        if patch is not None:
            tall, wide = picture.shape[0] / weight.shape[0], picture.shape[1] / weight.shape[1]
            corner = (patch[1] * wide - 0.5, patch[0] * tall - 0.5)
            row[0].add_patch(Rectangle(corner, wide, tall, fill=False, edgecolor="red", linewidth=1.5))
    for axes, heading in zip(panels[0], ("input", title) * pairs, strict=True):
        axes.set_title(heading, size=9 if pairs == 1 else 13)  # the wider the figure, the smaller it is shown
    return figure


def positions(similarity: Tensor) -> Any:
    """Figure 7, centre: for every patch the cosine similarity (rows, columns, rows, columns) of its position to all."""
    rows, columns = similarity.shape[:2]
    figure = blank(6.4, 6.4 * rows / columns)
    axes = figure.subplots()
    tiles = _tiled(similarity.float().flatten(0, 1).unsqueeze(-1), columns)[:, :, 0]
    image = axes.imshow(tiles.numpy(), vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    tall, wide = tiles.shape[0] / rows, tiles.shape[1] / columns
    axes.set_yticks([tall * (i + 0.5) for i in range(rows)], range(rows), size=7)
    axes.set_xticks([wide * (i + 0.5) for i in range(columns)], range(columns), size=7)
    axes.set_ylabel("row of the patch")
    axes.set_xlabel("column of the patch")
    axes.set_title("similarity of position embeddings", size=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
    return figure


def filters(components: Tensor) -> Any:
    """Figure 7, left: the components (n, C, P, Q) in [0, 1] of the embedding's filters, seven in a row."""
    n, channels = components.shape[:2]
    if channels not in (1, 3):
        components = components.mean(1, keepdim=True)
    columns = min(7, n)
    tiles = _tiled(components.float().permute(0, 2, 3, 1), columns)
    figure = blank(6.4, 6.4 * tiles.shape[0] / tiles.shape[1] + 0.4)
    axes = figure.subplots()
    axes.imshow(tiles.nan_to_num(1.0).expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"embedding filters: the first {n} principal components", size=10)
    return figure


def distance(distances: Tensor) -> Any:
    """Figures 7, right, and 11: the mean attention distance (layers, H) of every head, in pixels, by depth."""
    import matplotlib

    figure = blank(6.6, 4.0)
    axes = figure.subplots()
    heads = distances.shape[1]
    colours: Any = matplotlib.color_sequences["tab10" if heads <= 10 else "tab20"]
    for head in range(heads):
        values = distances[:, head].tolist()
        axes.scatter(range(len(distances)), values, s=18, color=colours[head % len(colours)], label=f"head {head}")
    if heads <= len(colours):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, handletextpad=0.1)
    axes.set_xlabel("depth (layer)")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.set_ylim(0, 1.05 * float(distances.max()) or 1.0)
    axes.set_title(f"attention distance of {distances.shape[1]} heads", size=10)
    return figure


def _tiled(tiles: Tensor, columns: int) -> Tensor:
    """(n, height, width, C) -> one picture with that many tiles in a row and gaps of NaN between them."""
    n, height, width, channels = tiles.shape
    rows, gap = math.ceil(n / columns), max(1, round(_GAP * min(height, width)))
    page = tiles.new_full((rows * columns, height + gap, width + gap, channels), torch.nan)
    page[:n, :height, :width] = tiles
    page = page.unflatten(0, (rows, columns)).transpose(1, 2)
    return page.reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]
