"""`fastvit attention`: where a model looks, and what it learned to look with: the paper's figures 6, 7 and 11."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from . import models
from .terminal import Json, UsageError, as_usage_errors, checked_name, printable, progress
from .views import View, most_filters, read_pictures, shown, weights_of

FIGURES = ("attention", "positions", "filters", "distance")


@models.with_model_options
def attention(
    output: Annotated[Path, typer.Option("--output", "-o", help="The figure: PNG, SVG or PDF.")],
    images: Annotated[list[str] | None, typer.Argument(help="Image files, directories, glob patterns.")] = None,
    figure: Annotated[str, typer.Option(help="attention, positions, filters or distance.")] = "attention",
    layer: Annotated[int, typer.Option(help="Index of the layer; -1 is the last.")] = -1,
    rollout: Annotated[bool, typer.Option("--rollout", help="All layers by attention rollout, not one.")] = False,
    head: Annotated[str, typer.Option(help="mean or max over the heads, or the number of one.")] = "mean",
    query: Annotated[str, typer.Option(help="Whose attention: cls, or a patch as row,column from 0.")] = "cls",
    json: Json = False,
    asked: models.Request = models.OWN_CHOICE,
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
    loaded = models.load(asked, classifier=False)
    failures: list[str] = []
    pictures = []
    if kind in ("attention", "distance"):
        pictures = list(read_pictures(images or [], [output], failures, "attention"))
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


def _draw(kind: str, loaded: models.Loaded, pictures: list[Any], view: View, told: dict[str, Any]) -> Any:
    import torch

    import fastvit
    from fastvit import analysis, figures

    if kind == "positions":
        return figures.positions(analysis.pos_embed_similarity(loaded.model).cpu())
    if kind == "filters":
        return figures.filters(analysis.embedding_filters(loaded.model, most_filters(loaded.model)))
    weights, seen, distances = [], [], []
    with progress(len(pictures)) as show, torch.no_grad(), fastvit.backend(loaded.backend):
        for number, picture in enumerate(pictures):
            show(number, f"{number + 1}/{len(pictures)} images", "")
            pixels = loaded.prepare.pixels(picture)
            x = loaded.inputs(loaded.prepare.normalised(pixels)[None])
            if kind == "distance":
                distances.append(analysis.attention_distance(loaded.model, x=x).cpu())
            else:
                weights.append(weights_of(loaded.model, x, view))
                seen.append(shown(pixels))
    if kind == "attention":
        return figures.attention(seen, weights, view.title, view.patch)
    mean = torch.stack(distances).mean(0)
    told["pixels"] = mean.tolist()
    return figures.distance(mean)
