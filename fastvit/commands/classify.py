"""`fastvit classify`: the likeliest classes of image files, by any checkpoint."""

import json as json_module
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich.box
import rich.console
import rich.table
import rich.text
import typer

from . import models
from .labels import read_labels
from .terminal import Json, UsageError, as_usage_errors, printable, progress

if TYPE_CHECKING:
    import torch

    from fastvit.images import ImageError


@dataclass(frozen=True)
class Guess:
    """One of an image's likeliest classes: its number, its label ("" without labels) and the softmax's share."""

    index: int
    label: str
    probability: float


@models.with_model_options
def classify(
    images: Annotated[list[str], typer.Argument(help="Image files, directories of images, glob patterns.")],
    labels: Annotated[Path | None, typer.Option(help="Labels: one a line, or JSON.  [default: the numbers]")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 16,
    json: Json = False,
    asked: models.Request = models.OWN_CHOICE,
) -> None:
    """Name the likeliest classes of images.

    An image that cannot be read is named on stderr, the others are classified, and the exit code is 1.
    """
    named = read_labels(labels) if labels else None
    loaded = models.load(asked)
    named = named or loaded.labels
    if named and len(named) != loaded.num_classes:
        raise UsageError(
            f"{labels or asked.checkpoint}: {len(named)} labels, but the model has {loaded.num_classes} classes"
        )

    from fastvit.images import find_images

    found = list(find_images(images))
    console = rich.console.Console(highlight=False)
    plain = not json and not console.is_terminal
    width = max([5, *(len(printable(name)) for name in found if isinstance(name, Path))])
    guessed: dict[str, list[Guess]] = {}
    failures: list[str] = []
    with progress(len(found)) as show:
        for number, (name, outcome) in enumerate(_outcomes(found, batch_size, loaded, named, topk)):
            if isinstance(outcome, str):
                failures.append(printable(outcome))
                print(f"fastvit: {failures[-1]}", file=sys.stderr)
            else:
                if plain and not guessed:
                    print(f"{'image':<{width}}  rank  probability  class  label")
                guessed[name] = outcome
                if plain:
                    print("\n".join(_rows(name, outcome, width)))
            show(number + 1, f"{number + 1}/{len(found)} images", "")
    if json:
        rows = [{"image": name, "top": [asdict(guess) for guess in top]} for name, top in guessed.items()]
        print(json_module.dumps({"model": loaded.name, "images": rows, "failures": failures}, indent=2))
    elif not plain:
        for name, top in guessed.items():
            console.print(rich.text.Text(printable(name), style="bold"), soft_wrap=True)
            console.print(_table(top))
    if failures:
        raise UsageError(f"classify: {len(failures)} of {len(found)} FAILED, see above")


def _outcomes(
    found: "Sequence[Path | ImageError]", batch_size: int, loaded: models.Loaded, labels: list[str] | None, topk: int
) -> Iterator[tuple[str, list[Guess] | str]]:
    """For every image its path and its likeliest classes, or one line that says why there are none."""
    from fastvit.images import ImageError

    for start in range(0, len(found), batch_size):
        outcomes: list[tuple[str, torch.Tensor | str]] = []
        for name in found[start : start + batch_size]:
            try:
                outcomes.append((str(name), str(name) if isinstance(name, ImageError) else loaded.prepare.read(name)))
            except ImageError as error:
                outcomes.append((str(name), str(error)))
        shares = iter(_softmax(loaded, [pixels for _, pixels in outcomes if not isinstance(pixels, str)]))
        for path, outcome in outcomes:
            yield path, outcome if isinstance(outcome, str) else _top(path, next(shares), labels, topk)


def _softmax(loaded: models.Loaded, pixels: "Sequence[torch.Tensor]") -> "torch.Tensor | tuple[()]":
    """Each image's share of every class, fp32 (B, K) on the CPU."""
    import torch

    import fastvit

    if not pixels:
        return ()
    # a demanded backend refuses what it cannot run, and memory ends where --batch-size is too large
    refusals = as_usage_errors(fastvit.BackendError, torch.OutOfMemoryError)
    with refusals, torch.inference_mode(), fastvit.backend(loaded.backend):
        return loaded.logits(torch.stack(list(pixels))).float().softmax(-1).cpu()


def _top(path: str, shares: "torch.Tensor", labels: list[str] | None, topk: int) -> list[Guess] | str:
    if not shares.isfinite().all():
        return f"{path}: the logits are not finite; --dtype float32 may help"
    top = shares.topk(min(topk, shares.numel()))
    return [
        Guess(index, labels[index] if labels else "", share)
        for share, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _rows(name: str, top: Sequence[Guess], width: int) -> Iterator[str]:
    """Aligned lines for a pipe: the label, which may have blanks, comes last."""
    for rank, guess in enumerate(top, 1):
        cells = f"{printable(name):<{width}}  {rank:>4}  {guess.probability:>11.6f}  {guess.index:>5}"
        yield f"{cells}  {printable(guess.label)}".rstrip()


def _table(top: Sequence[Guess]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False)
    for heading in ("probability", "", "class"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    table.add_column("label")
    for rank, guess in enumerate(top):
        bar = rich.text.Text("\u2588" * round(20 * guess.probability), style="cyan")
        label = rich.text.Text(printable(guess.label))
        table.add_row(f"{guess.probability:.2%}", bar, str(guess.index), label, style="" if rank else "bold")
    return table
