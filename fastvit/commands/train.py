"""`fastvit train`: a Vision Transformer from labelled images, by the paper's recipes; goes on where it was stopped."""

import contextlib
import json as json_module
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import rich.progress
import typer

from . import models
from .recipe_options import with_recipe_options
from .terminal import Json, UsageError, as_usage_errors, backend_names, checked_name, finite, printable, torch_device

if TYPE_CHECKING:
    from fastvit.training.loop import Progress
    from fastvit.training.start import Trained


@with_recipe_options
def train(
    data: Annotated[
        str, typer.Argument(help="digits, cifar10:DIR, cifar100:DIR, folder:DIR, wds:DIR/x-{000..009}.tar, hf:NAME.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's directory.")],
    model: Annotated[str, typer.Option(help="Model name.")] = models.DEFAULT_MODEL,
    recipe: Annotated[str, typer.Option(help="pretrain (table 3) or finetune (table 4).")] = "finetune",
    checkpoint: models.Checkpoint = None,
    weights_only: models.WeightsOnly = False,
    img_size: models.ImgSize = 0,
    test: Annotated[str, typer.Option(help="Images to evaluate on, or none.  [default: the data's test split]")] = "",
    resume: Annotated[str, typer.Option(help="auto, never or must.")] = "auto",
    parallel: Annotated[str, typer.Option(help="auto, none, ddp, fsdp or tp; processes come from torchrun.")] = "auto",
    workers: models.Workers = None,
    device: models.Device = "",
    backend: models.Backend = "",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's events.")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="Draw curve.png and rollout.png at the end.")] = False,
    json: Json = False,
    recipe_options: Any = None,
) -> None:
    """Train a model, or fine-tune a checkpoint; the same command goes on with a run that was stopped.

    With --checkpoint the weights come from a file of any known layout, with a new head of zeros for the data's classes,
    and positions are interpolated for another --img-size. Ctrl-C leaves a checkpoint.
    """
    import fastvit
    from fastvit import backends
    from fastvit.training import RECIPES, TrainingError, train as run
    from fastvit.training.run import RESUME

    name = checked_name(model, fastvit.list_models(), "model")
    chosen = checked_name(recipe, list(RECIPES), "recipe")
    way = checked_name(backend, backend_names(), "backend", "auto")
    why = backends.why_unavailable(way)
    if why is not None:
        raise UsageError(f"--backend {way}: {why}")
    torch_device(device)
    if checkpoint is not None and not checkpoint.exists():
        raise UsageError(f"{checkpoint}: no such checkpoint")
    kinds = (TrainingError, ValueError, TypeError, OSError)
    with as_usage_errors(*kinds), _warnings_on_stderr():
        drawn = _pictures() if figures else None
        with _bar() as show:
            trained = run(
                data,
                output,
                model=name,
                recipe=RECIPES[chosen],
                test=None if test == "none" else test,
                checkpoint=checkpoint,
                weights_only=weights_only or None,
                img_size=img_size or None,
                backend=way,
                device=device,
                parallel=parallel,
                workers=workers,
                resume=checked_name(resume, RESUME, "resume", "auto"),
                tensorboard=tensorboard,
                show=show,
                **(recipe_options or {}),
            )
        if not trained.is_main:
            return
        written = [str(path) for path in drawn(trained, data)] if drawn is not None else []
    _print(trained, name, written, json)


def _print(trained: "Trained", name: str, written: list[str], json: bool) -> None:
    told = {
        "model": name,
        "run": str(trained.run),
        "steps": trained.steps,
        "resumed_after": trained.first,
        "loss": finite(trained.loss),
        "test": None if trained.evaluation is None else asdict(trained.evaluation),
        "seconds": round(trained.seconds, 3),
        "images_per_s": round(trained.images_per_s, 1),
        "weights": str(trained.run / "model.safetensors"),
        "figures": written,
    }
    if json:
        print(json_module.dumps(told, indent=2))
        return
    tested = trained.evaluation
    rows = [("steps", f"{trained.steps}" + (f" (from {trained.first})" if trained.first else ""))]
    if trained.first < trained.steps:
        rows += [("loss", f"{trained.loss:.4f}"), ("seconds", f"{trained.seconds:.1f}")]
        rows.append(("images/s", f"{trained.images_per_s:.1f}"))
    if tested is not None:
        rows.append(("test", f"{tested.images} images, loss {tested.loss:.4f}"))
        rows.append(("top-1", f"{100 * tested.top1:.2f} %"))
        rows.append(("top-5", f"{100 * tested.top5:.2f} %"))
    rows += [("weights", printable(told["weights"])), *(("figure", printable(path)) for path in written)]
    for label, value in rows:
        print(f"{label:<9} {value}")


def _pictures() -> "Callable[[Trained, str], list[Path]]":
    """What draws a run's figures; what that needs is looked for before the run."""
    from fastvit.training.pictures import check, draw

    check()
    return draw


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """fastvit's warnings as one line each."""
    usual = warnings.showwarning

    def one_line(message: Warning | str, *rest: Any, **named: Any) -> None:
        if str(message).startswith("fastvit"):
            print(printable(message), file=sys.stderr)
        else:
            usual(message, *rest, **named)

    warnings.showwarning = one_line
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextlib.contextmanager
def _bar() -> "Iterator[Callable[[Progress], None]]":
    """A bar on stderr while it is a terminal: loss, rate, images/s, accuracy of the last evaluation, remaining time."""
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        rich.progress.TextColumn("{task.fields[stage]}"),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    options: dict[str, Any] = {"transient": True, "redirect_stdout": False, "disable": not console.is_terminal}
    with rich.progress.Progress(*columns, console=console, **options) as bar:
        task = bar.add_task("starting", total=1.0, stage="")
        accuracy = ""

        def show(progress: "Progress") -> None:
            nonlocal accuracy
            row = progress.row
            if "top1" in row:
                accuracy = f"  top-1 {100 * row['top1']:.2f} %"
            parts = [f"{word} {row[key]:{form}}" for key, word, form in _SHOWN if key in row]
            stage = "  ".join(parts) + accuracy
            bar.update(
                task,
                total=float(progress.steps),
                completed=float(row["step"]),
                description=progress.stage or "training",
                stage=stage,
            )

        yield show


_SHOWN = (("loss", "loss", ".4f"), ("lr", "lr", ".2e"), ("images_per_s", "images/s", ".0f"))
