"""What a run looks like: the curves of its log, and what its model looks at in some of the test images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import analysis, figures
from .error import TrainingError
from .evaluation import device_of, size_of
from .log import read_log
from .run import LOG

if TYPE_CHECKING:
    from .start import Trained

SHOWN = 6  # test images


def check() -> None:
    """Look for what drawing needs.

    Raises:
        TrainingError: matplotlib is missing.
    """
    try:
        figures.check_target("curve.png")
    except figures.FigureError as error:
        raise TrainingError(f"fastvit: {error}") from None


def draw(trained: "Trained", data: str) -> list[Path]:
    """curve.png and, for a place with test images, rollout.png in the run's directory."""
    written = [figures.save(curves({trained.run.name: trained.run}), trained.run / "curve.png")]
    if trained.evaluation is not None:
        from fastvit.data import open_source

        written.append(figures.save(rollout(trained.model, open_source(data, "test")), trained.run / "rollout.png"))
    return written


def curves(runs: Mapping[str, Path]) -> Any:
    """Loss and test accuracy of runs, by label, over the steps, from their log.csv."""
    figure = figures.blank(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    for number, (label, run) in enumerate(runs.items()):
        rows = read_log(run / LOG)
        style = {"color": f"C{number}", "label": label, "linestyle": ("-", "--", ":")[number % 3]}
        left.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, **style)
        tested = [row for row in rows if "top1" in row]
        right.plot([row["step"] for row in tested], [100 * row["top1"] for row in tested], marker=".", **style)
    for axes, title in ((left, "training loss"), (right, "test accuracy (top-1, %)")):
        axes.set_title(title, size=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def rollout(model: torch.nn.Module, source: Any) -> Any:
    """Attention rollout (paper, figure 6) over a source's first images, of what the model pools: the class token, or
    the mean of all patches."""
    from fastvit.data import Augmentation, Batches

    batches = Batches(source, SHOWN, size=size_of(model), train=False, augmentation=Augmentation())
    images, _ = next(iter(batches.epoch(0)))
    images = images.to(device_of(model))
    with torch.no_grad():
        rolled = analysis.attention_rollout(model, images)
        grid = analysis.patch_grid(model, images)
    rows = rolled[:, -grid[0] * grid[1] :].mean(1)
    if getattr(model, "global_pool", "token") == "token":
        rows = rolled[:, 0]
    weights = analysis.patch_maps(rows, grid).float().cpu()
    pictures: Sequence[torch.Tensor] = [image.permute(1, 2, 0).float().cpu() / 255 for image in images]
    pictures = [p.expand(-1, -1, 3) if p.shape[-1] == 1 else p for p in pictures]
    return figures.attention(pictures, list(weights), "attention rollout", pairs=3)
