"""`fastvit figures`: all figures of "An Image is Worth 16x16 Words" from one model and some images, in one folder."""

import csv
import json as json_module
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import figures_page, models
from .terminal import Json, UsageError, as_usage_errors, benchmarks, checked_name, printable, progress
from .views import View, most_filters, read_pictures, shown, weights_of

if TYPE_CHECKING:
    from torch import Tensor

    from fastvit.compute import Row

FIGURES = ("rollout", "distance", "positions", "filters", "compute")
_BESIDE = {"distance": ("csv",), "compute": ("csv", "md")}  # the numbers of a figure, as files
_OURS = re.compile(r"fastvit(\.\w+)*: ")  # how our own errors begin; any other is a fault, not a reason
_PAIRS = 3  # of rollouts in a row


@dataclass
class Told:
    """What became of each figure: the files written, or why there are none."""

    written: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    rows: "list[Row]" = field(default_factory=list)


@models.with_model_options
def figures(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name, or a checkpoint: a file or a directory.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Files, directories, glob patterns.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder for all figures.")],
    format: Annotated[str, typer.Option(help="Of the figures: png, svg or pdf.")] = "png",
    rollouts: Annotated[int, typer.Option(min=1, help="Images to show; distances are over all of them.")] = 24,
    json: Json = False,
    asked: models.Request = models.OWN_CHOICE,
) -> None:
    """Draw the figures of "An Image is Worth 16x16 Words" from a model, and a page that shows them, index.html.

    rollout: where it looks (6, 14). distance: how far each head looks, over all images (7 right, 11). positions: how
    alike position embeddings are (7 centre). filters: of the embedding (7 left). compute: its cost among ResNets,
    hybrids and Vision Transformers (as 5). What the model does not have is left out, with the reason.
    """
    from fastvit import figures as drawing

    kind = checked_name(format, [suffix[1:] for suffix in drawing.FORMATS], "format", "png")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: a file, not a folder for figures")
    targets = {name: output / f"{name}.{kind}" for name in FIGURES}
    with as_usage_errors(drawing.FigureError):
        for target in targets.values():
            drawing.check_target(target)
    name, checkpoint = models.named_or_placed(model, asked.checkpoint)
    asked = replace(asked, model=name, checkpoint=checkpoint)
    loaded = models.load(asked, classifier=False)
    told = Told()
    pictures = read_pictures(images, list(targets.values()), told.failures, "figures")
    seen = [loaded.prepare.pixels(picture) for picture in pictures]
    for figure, draw in _drawers(loaded, seen, rollouts, told, output).items():
        try:
            drawn = draw()
        except (ValueError, TypeError, RuntimeError) as error:
            if not (own := _OURS.match(str(error))):
                raise
            told.left_out[figure] = printable(str(error)[own.end() :])
            continue
        drawing.save(drawn, targets[figure])
        told.written += [targets[figure].name, *(f"{figure}.{suffix}" for suffix in _BESIDE.get(figure, ()))]
    if not told.written:
        raise UsageError(f"figures: none could be drawn: {'; '.join(dict.fromkeys(told.left_out.values()))}")
    page = figures_page.page(loaded.name, len(seen), kind, told.written, told.left_out, told.rows)
    with drawing.in_one_step(output / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    _tell(output, loaded.name, told, json)
    if told.failures:
        total = len(told.failures) + len(seen)
        raise UsageError(f"figures: {len(told.failures)} of {total} images FAILED, see above")


def _drawers(
    loaded: models.Loaded, seen: "Sequence[Tensor]", rollouts: int, told: Told, output: Path
) -> dict[str, Callable[[], Any]]:
    """For each figure what draws it, and raises ValueError, TypeError or RuntimeError where the model has none."""
    from fastvit import analysis, figures as drawing

    def filters() -> Any:
        return drawing.filters(analysis.embedding_filters(loaded.model, most_filters(loaded.model)))

    return {
        "rollout": lambda: _rollout(loaded, seen[:rollouts]),
        "distance": lambda: _distance(loaded, seen, output / "distance.csv"),
        "positions": lambda: drawing.positions(analysis.pos_embed_similarity(loaded.model).cpu()),
        "filters": filters,
        "compute": lambda: _compute(loaded, seen[0], told, output),
    }


def _rollout(loaded: models.Loaded, seen: "Sequence[Tensor]") -> Any:
    from fastvit import figures as drawing
    from fastvit.integrations.embeddings import embedding_of

    embedding = embedding_of(loaded.model)
    if embedding is not None and not embedding.class_token:
        raise ValueError("fastvit.figures: the model has no class token, whose attention is rolled out")
    view = View(rollout=True)
    weights = list(_each(loaded, seen, "attention rollout", lambda x: weights_of(loaded.model, x, view)))
    return drawing.attention([shown(picture) for picture in seen], weights, "attention", None, _PAIRS)


def _distance(loaded: models.Loaded, seen: "Sequence[Tensor]", target: Path) -> Any:
    import torch

    from fastvit import analysis, figures as drawing

    def measured(x: Any) -> "Tensor":
        return analysis.attention_distance(loaded.model, x=x).cpu()

    mean = torch.stack(list(_each(loaded, seen, "attention distance", measured))).mean(0)
    heads = [f"head_{number}" for number in range(mean.shape[1])]
    _write_csv(target, ["layer", *heads], [[layer, *row] for layer, row in enumerate(mean.tolist())])
    return drawing.distance(mean)


def _each(
    loaded: models.Loaded, seen: "Sequence[Tensor]", doing: str, measure: "Callable[[Any], Tensor]"
) -> "Iterator[Tensor]":
    """What is measured of each image, one by one."""
    import torch

    import fastvit

    refusals = as_usage_errors(fastvit.BackendError, torch.OutOfMemoryError)
    with refusals, progress(len(seen)) as show, torch.no_grad(), fastvit.backend(loaded.backend):
        for number, picture in enumerate(seen):
            show(number, f"{doing}  {number + 1}/{len(seen)} images", "")
            yield measure(loaded.inputs(loaded.prepare.normalised(picture)[None]))


def _compute(loaded: models.Loaded, picture: "Tensor", told: Told, output: Path) -> Any:
    from fastvit import compute, compute_chart, figures as drawing
    from fastvit.integrations.embeddings import embedding_of

    embedding = embedding_of(loaded.model)
    family = "hybrid" if embedding is not None and embedding.weight is None else "ViT"
    x = loaded.inputs(loaded.prepare.normalised(picture)[None])
    rows = [compute.row(loaded.name, family, loaded.model, x, asked=True)]
    timm, _ = benchmarks("peers").import_timm()
    with progress(compute.PAPERS) as show:
        for number, row in enumerate(compute.papers_rows(timm)):
            show(number, f"multiply-adds  {number + 1}/{compute.PAPERS} models", "")
            if isinstance(row, compute.Row):
                rows.append(row)
            else:
                told.left_out[row[0]] = row[1]
    told.rows += sorted(rows, key=lambda row: (compute.FAMILIES.index(row.family), row.macs))
    _write_csv(output / "compute.csv", figures_page.COLUMNS, [figures_page.cells(row) for row in told.rows])
    with drawing.in_one_step(output / "compute.md") as temporary:
        temporary.write_text(figures_page.markdown(told.rows), encoding="utf-8")
    return compute_chart.chart(told.rows)


def _write_csv(target: Path, heading: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from fastvit.figures import in_one_step

    with in_one_step(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([heading, *rows])


def _tell(output: Path, name: str, told: Told, json: bool) -> None:
    written = [str(output / file) for file in (*told.written, "index.html")]
    if json:
        costs = [dict(zip(figures_page.COLUMNS, figures_page.cells(row), strict=True)) for row in told.rows]
        facts = {"model": name, "written": written, "left_out": told.left_out, "failures": told.failures}
        print(json_module.dumps({**facts, "compute": costs}, indent=2))
        return
    for path in written:
        print(printable(path))
    for figure, why in told.left_out.items():
        print(f"{figure}: left out, {why}")
