"""`fastvit attention`: where a model looks, and what it learned to look with: the paper's figures 6, 7 and 11."""

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import models
from .terminal import Json, UsageError, as_usage_errors, checked_name, printable, progress

if TYPE_CHECKING:
    import torch

FIGURES = ("attention", "positions", "filters", "distance")
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


def attention(
    output: Annotated[Path, typer.Option("--output", "-o", help="The figure: PNG, SVG or PDF.")],
    images: Annotated[list[str] | None, typer.Argument(help="Image files, directories, glob patterns.")] = None,
    figure: Annotated[str, typer.Option(help="attention, positions, filters or distance.")] = "attention",
    layer: Annotated[int, typer.Option(help="Index of the layer; -1 is the last.")] = -1,
    rollout: Annotated[bool, typer.Option("--rollout", help="All layers by attention rollout, not one.")] = False,
    head: Annotated[str, typer.Option(help="mean or max over the heads, or the number of one.")] = "mean",
    query: Annotated[str, typer.Option(help="Whose attention: cls, or a patch as row,column from 0.")] = "cls",
    model: models.ModelName = "",
    checkpoint: models.Checkpoint = None,
    weights_only: models.WeightsOnly = False,
    img_size: models.ImgSize = 0,
    crop_pct: models.CropPct = 0.0,
    mean: models.Mean = "",
    std: models.Std = "",
    device: models.Device = "",
    dtype: models.Dtype = "float32",
    backend: models.Backend = "",
    no_accelerate: models.NoAccelerate = False,
    random_weights: models.RandomWeights = False,
    json: Json = False,
) -> None:
    """Draw where a model looks in images, from the attention of a model that stays fused.

    attention: images as the model sees them, darkened where little attention goes. distance: how far each head looks,
    over all images. positions and filters come from the weights and need no image.
    """
    from fastvit import figures

    kind = checked_name(figure, FIGURES, "figure", FIGURES[0])
    view = View(layer, rollout, _head(head), _patch(query))
    if rollout and (layer, head) != (-1, "mean"):
        raise UsageError("--rollout is over all layers, of the mean of all heads: leave out --layer and --head")
    if kind in ("attention", "distance") and not images:
        raise UsageError(f"--figure {kind} needs images")
    with as_usage_errors(figures.FigureError):
        figures.check_target(output)
    asked = models.Request(
        model=model,
        checkpoint=checkpoint,
        random_weights=random_weights,
        weights_only=weights_only,
        img_size=img_size,
        crop_pct=crop_pct,
        mean=mean,
        std=std,
        device=device,
        dtype=dtype,
        backend=backend,
        no_accelerate=no_accelerate,
    )
    loaded = models.load(asked, classifier=False)
    failures: list[str] = []
    pictures = _pictures(images or [], output, failures) if kind in ("attention", "distance") else []
    told: dict[str, Any] = {"figure": kind, "model": loaded.name}
    with as_usage_errors(ValueError, TypeError, RuntimeError):
        drawn = _draw(kind, loaded, pictures, view, told)
    told["written"] = str(figures.save(drawn, output))
    print(json_module.dumps({**told, "failures": failures}, indent=2) if json else printable(output))
    if failures:
        raise UsageError(f"attention: {len(failures)} of {len(failures) + len(pictures)} FAILED, see above")


def _head(text: str) -> int | str:
    if text not in ("mean", "max") and not text.isdecimal():
        raise UsageError(f"head must be mean, max or a number, got {text!r}")
    return int(text) if text.isdecimal() else text


def _patch(text: str) -> tuple[int, int] | None:
    if text == "cls":
        return None
    row, comma, column = text.partition(",")
    if not comma or not row.strip().isdecimal() or not column.strip().isdecimal():
        raise UsageError(f"query must be cls or row,column, got {text!r}")
    return int(row), int(column)


def _pictures(names: list[str], output: Path, failures: list[str]) -> list[Any]:
    """The images that can be read, as PIL has them; what is wrong with the others goes to stderr and ``failures``."""
    from fastvit.images import ImageError, find_images, read_rgb

    found = []
    for name in find_images(names):
        try:
            if isinstance(name, ImageError):
                raise name
            if output.exists() and name.exists() and output.samefile(name):
                raise UsageError(f"{output}: an image to be read; give the figure another name")
            found.append(read_rgb(name))
        except ImageError as error:
            failures.append(printable(error))
            print(f"fastvit: {failures[-1]}", file=sys.stderr)
    if not found:
        raise UsageError("attention: no image could be read")
    return found


def _draw(kind: str, loaded: models.Loaded, pictures: list[Any], view: View, told: dict[str, Any]) -> Any:
    import torch

    import fastvit
    from fastvit import analysis, figures

    if kind == "positions":
        return figures.positions(analysis.pos_embed_similarity(loaded.model).cpu())
    if kind == "filters":
        return figures.filters(analysis.embedding_filters(loaded.model, _most_filters(loaded.model)))
    weights, seen, distances = [], [], []
    with progress(len(pictures)) as show, torch.no_grad(), fastvit.backend(loaded.backend):
        for number, picture in enumerate(pictures):
            show(number, f"{number + 1}/{len(pictures)} images", "")
            x = loaded.inputs(loaded.prepare(picture)[None])
            if kind == "distance":
                distances.append(analysis.attention_distance(loaded.model, x=x).cpu())
            else:
                weights.append(_weights(loaded.model, x, view))
                seen.append(_pixels(loaded.prepare.picture(picture)))
    if kind == "attention":
        return figures.attention(seen, weights, view.title, view.patch)
    mean = torch.stack(distances).mean(0)
    told["pixels"] = mean.tolist()
    return figures.distance(mean)


def _most_filters(model: "torch.nn.Module") -> int:
    """As many filters as the paper shows, or as there are."""
    from fastvit.integrations.embeddings import embedding_of

    embedding = embedding_of(model)
    weight = None if embedding is None else embedding.weight
    return SHOWN if weight is None else min(SHOWN, weight.shape[0], weight[0].numel())


def _weights(model: "torch.nn.Module", x: Any, view: View) -> "torch.Tensor":
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


def _pixels(picture: Any) -> "torch.Tensor":
    """A PIL image as (height, width, 3) in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture, dtype=np.uint8)).float() / 255
