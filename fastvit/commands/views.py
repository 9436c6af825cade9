"""What `fastvit attention` and `fastvit figures` share: pictures read, and what a model makes of them as numbers."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import UsageError, printable

if TYPE_CHECKING:
    import torch
    from PIL import Image

SHOWN = 28  # embedding filters, as in figure 7


@dataclass(frozen=True)
class View:
    """Which attention to draw: of a layer, or rolled out through all of them; of a head; of the class token (None) or
    of the patch (row, column)."""

    layer: int = -1
    rollout: bool = False
    head: int | str = "mean"
    patch: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        query = f"patch {self.patch[0]},{self.patch[1]}" if self.patch else "class token"
        return f"rollout, {query}" if self.rollout else f"layer {self.layer}, head {self.head}, {query}"


def read_pictures(
    names: Sequence[str], outputs: Sequence[Path], failures: list[str], command: str
) -> Iterator["Image.Image"]:
    """The images that can be read, one by one; what is wrong with the others goes to stderr and ``failures``.

    Raises:
        UsageError: one of them is among the files that will be written, or none can be read.
    """
    from fastvit.images import ImageError, find_images, read_rgb

    found = 0
    for name in find_images(names):
        try:
            if isinstance(name, ImageError):
                raise name
            for output in outputs:
                if output.exists() and name.exists() and output.samefile(name):
                    raise UsageError(f"{output}: an image to be read; give the figure another name")
            picture = read_rgb(name)
        except ImageError as error:
            failures.append(printable(error))
            print(f"fastvit: {failures[-1]}", file=sys.stderr)
            continue
        found += 1
        yield picture
    if not found:
        raise UsageError(f"{command}: no image could be read")


def most_filters(model: "torch.nn.Module") -> int:
    """As many filters as the paper shows, or as there are."""
    from fastvit.integrations.embeddings import embedding_of

    embedding = embedding_of(model)
    weight = None if embedding is None else embedding.weight
    return SHOWN if weight is None else min(SHOWN, weight.shape[0], weight[0].numel())


def weights_of(model: "torch.nn.Module", x: Any, view: View) -> "torch.Tensor":
    """The attention of one image's query to every patch, (rows, columns) on the CPU."""
    import fastvit
    from fastvit import analysis

    rows, columns = grid = analysis.patch_grid(model, x)
    if view.patch and (view.patch[0] >= rows or view.patch[1] >= columns):
        raise UsageError(f"query {view.patch[0]},{view.patch[1]} is outside of the {rows} x {columns} patches")
    if view.rollout:
        rolled = analysis.attention_rollout(model, x)[0]
        first = rolled.shape[0] - rows * columns
        if view.patch is None and not first:
            raise UsageError("this model has no class token: say whose attention with --query row,column")
        row = rolled[first + view.patch[0] * columns + view.patch[1] if view.patch else 0]
    else:
        heads: Any = None if view.head == "max" else view.head
        queries: Any = [view.patch] if view.patch else "cls"
        row = fastvit.attention_maps(model, x, layers=view.layer, queries=queries, heads=heads)[0][0, :, 0].amax(0)
    return analysis.patch_maps(row, grid).float().cpu()


def shown(pixels: "torch.Tensor") -> "torch.Tensor":
    """uint8 (3, height, width) as (height, width, 3) in [0, 1]."""
    return pixels.permute(1, 2, 0).float() / 255
