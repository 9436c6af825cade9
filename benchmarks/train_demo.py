"""A Vision Transformer trained from scratch on scikit-learn's digits, on fastvit's kernels and in eager, with pictures.

    python -m fastvit.benchmarks.train_demo build/train-demo

The two runs have the same weights to begin with, the same images in the same order, and by the tolerance rule the same
loss: within 1e-4, relative, over the first 200 steps.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastvit import figures, training
from fastvit.data import open_source
from fastvit.training import pictures
from fastvit.training.log import read_log
from fastvit.training.trained import is_run

MODEL = "vit_nano_patch8_32"
PLACE = "digits"
ENOUGH = 0.97  # of the test images
SAME = 1e-4  # relative, of the loss
FIRST = 200  # steps
RECIPE: dict[str, Any] = {
    "recipe": "pretrain",
    "epochs": 60.0,
    "batch_size": 64,
    "lr": 7e-4,
    # a second moment that remembers a thousand steps lets Adam overshoot while so small a model takes off, and two runs
    # that differ in a rounding part: their losses are then 1e-2 apart after a hundred steps
    "betas": (0.9, 0.95),
    "warmup_steps": 600,
    "weight_decay": 0.05,
    "dropout": 0.0,
    "label_smoothing": 0.1,
    "crop_scale": None,
    "flip": False,  # a mirrored 3 is no 3
    "shift": 2,
    "eval_every": 110,
    "checkpoint_every": 330,
}
OPTIONS = {"global_pool": "avg"}  # a class token would take longer to learn where to look
RUNS = {"fastvit": "auto", "eager": "reference"}


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, draw; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="fastvit.benchmarks.train_demo", description=__doc__)
    parser.add_argument("out", type=Path, help="directory of both runs and of the pictures")
    parser.add_argument("--steps", type=int, default=0, help="of each run [default: 60 epochs, 1320 steps]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-eager", action="store_true", help="leave the run in eager out")
    asked = parser.parse_args(arguments)
    pictures.check()
    options = {**RECIPE, "seed": asked.seed}
    if asked.steps:
        options |= {"epochs": 0.0, "steps": asked.steps, "warmup_steps": min(600, asked.steps - 1)}
    runs = dict(list(RUNS.items())[: 1 if asked.no_eager else 2])
    print(f"{'run':<8} {'steps':>5} {'loss':>8} {'top-1':>8} {'seconds':>8} {'images/s':>9}")
    found = {}
    for name, backend in runs.items():
        if is_run(asked.out / name):  # of an earlier demonstration
            shutil.rmtree(asked.out / name)
        with _bar(name) as show:
            began = time.perf_counter()
            found[name] = done = training.train(
                PLACE,
                asked.out / name,
                model=MODEL,
                model_options=OPTIONS,
                backend=backend,
                device="cpu",
                show=show,
                **options,
            )
            seconds = time.perf_counter() - began
        assert done.evaluation is not None
        accuracy = f"{100 * done.evaluation.top1:.2f} %"
        print(f"{name:<8} {done.steps:>5} {done.loss:>8.4f} {accuracy:>8} {seconds:>8.1f} {done.images_per_s:>9.1f}")
    figures.save(pictures.curves({name: asked.out / name for name in runs}), asked.out / "curve.png")
    test = open_source(PLACE, "test")
    figures.save(pictures.rollout(found["fastvit"].model, test), asked.out / "rollout.png")
    print(asked.out / "curve.png", asked.out / "rollout.png", sep="\n")
    return _judge(found, asked.out, bool(asked.steps))


@contextmanager
def _bar(name: str) -> Iterator[Callable[[Any], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=1.0)

        def show(told: Any) -> None:
            speed = f"{told.row.get('images_per_s', 0.0):.0f} images/s"
            bar.update(task, total=told.steps, completed=told.row["step"], description=f"{name}  {speed}")

        yield show


def _judge(found: dict[str, training.Trained], out: Path, shortened: bool) -> int:
    failures = []
    if "eager" in found:
        apart = largest_difference(out / "fastvit", out / "eager")
        print(f"loss apart by {apart:.1e} at most, relative, in the first {FIRST} steps (allowed {SAME:g})")
        if not apart <= SAME:
            failures.append("the losses are too far apart")
    tested = found["fastvit"].evaluation
    if not shortened and tested is not None and tested.top1 < ENOUGH:
        failures.append(f"top-1 is below {100 * ENOUGH:g} %")
    for failure in failures:
        print(f"fastvit: train_demo: {failure}", file=sys.stderr)
    return 1 if failures else 0


def largest_difference(one: Path, other: Path) -> float:
    """Of the losses of two runs in their first steps, relative to the second's."""
    rows = (read_log(run / "log.csv")[:FIRST] for run in (one, other))
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*rows, strict=True))


if __name__ == "__main__":
    sys.exit(main())
