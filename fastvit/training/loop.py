"""The training loop: from labelled images and a model's name to a directory with weights, checkpoints and a log."""

import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import VisionTransformer
from . import checkpoints
from .average import Average
from .error import TrainingError
from .evaluation import Evaluation, autocast_of, measured
from .interrupt import Interrupt
from .log import Log, Row
from .optimizer import make_optimizer
from .parallel import Parallel
from .recipe import Recipe
from .run import MODEL
from .schedule import learning_rate
from .state import load_state, save_state

if TYPE_CHECKING:
    from fastvit.data import Batches

_FEW = 10  # steps between looks at the loss where each look waits for a GPU or for other processes


@dataclass(frozen=True)
class Progress:
    """What ``show`` is told: the newest row of the log and how many steps there will be, and what is done now."""

    row: Row
    steps: int
    stage: str = ""


Show = Callable[[Progress], None]


class Loop:
    """The steps of one process of a run. ``model`` is the bare one, ``run`` the directory.

    Random numbers of a step are a function of (seed, step, share of the data), so that nothing of them is saved and a
    run that goes on draws what it would have drawn.
    """

    def __init__(
        self,
        run: Path,
        model: VisionTransformer,
        recipe: Recipe,
        parallel: Parallel,
        batches: "Batches",
        test: "Batches | None",
        show: Show | None,
    ) -> None:
        self.run, self.model, self.recipe, self.parallel = run, model, recipe, parallel
        self.batches, self.test, self._show = batches, test, show
        self.steps = recipe.steps or max(1, round(recipe.epochs * batches.steps))
        if recipe.warmup_steps >= self.steps:
            raise TrainingError(
                f"fastvit: warmup_steps must be below the {self.steps} steps of {recipe.epochs:g} epochs of "
                f"{batches.steps}, got {recipe.warmup_steps}"
            )
        model.set_grad_checkpointing(recipe.grad_checkpointing)
        self.wrapped: nn.Module = parallel.wrap(model)
        self.optimizer = make_optimizer(model, recipe, **parallel.optimizer_options)
        self.average = Average(model, recipe.ema) if recipe.ema else None
        self.autocast = autocast_of(model, recipe.dtype)
        self.evaluation: Evaluation | None = None
        self.seconds, self.images = 0.0, 0
        self._unseen: list[tuple[Row, Tensor, Tensor | None]] = []
        self._few = 1 if parallel.device.type == "cpu" and parallel.world == 1 else _FEW

    def resume(self, checkpoint: checkpoints.Checkpoint) -> int:
        """Take a checkpoint's state; returns its step."""
        load_state(checkpoint.folder, self.parallel, self.model, self.optimizer, self.average)
        self.seconds, self.images = float(checkpoint.facts["seconds"]), int(checkpoint.facts["images"])
        return checkpoint.step

    def go(self, first: int, log: Log | None) -> Row:
        """The steps after the first ones, which are done; returns the last row of the log.

        Raises:
            TrainingError: the loss is no number, or a checkpoint cannot be written. KeyboardInterrupt: after SIGINT or
                SIGTERM, when a checkpoint is written.
        """
        row: Row = {"step": first}
        self.model.train()
        with Interrupt() as interrupt:
            began = time.perf_counter()
            for step, images, targets in self._data(first):
                self._unseen.append(self._update(step, images, targets))
                done = step + 1
                look = done % self._few == 0 or done == self.steps
                evaluate, save = self._due(done, self.recipe.eval_every), self._due(done, self.recipe.checkpoint_every)
                if not (look or evaluate or save):
                    continue
                rows = self._seen(time.perf_counter() - began)
                row = rows[-1]
                if evaluate and self.test is not None:
                    row.update(self._evaluate(row))
                if log is not None:
                    log.write(rows)
                    self._tell(row)
                stop = bool(self.parallel.sum(torch.tensor(float(interrupt.seen), device=self.parallel.device)))
                if save or stop:
                    self.save(done)
                if stop and done < self.steps:
                    raise KeyboardInterrupt
                began = time.perf_counter()
        return row

    def _due(self, done: int, every: int) -> bool:
        return done == self.steps or (every > 0 and done % every == 0)

    def _data(self, step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        while step < self.steps:
            epoch, start = divmod(step, self.batches.steps)
            before = step
            for images, targets in self.batches.epoch(epoch, start):
                yield step, images, targets
                step += 1
                if step == self.steps:
                    return
            if step == before:
                raise TrainingError(f"fastvit: epoch {epoch} ended before step {step}, its data are fewer than before")

    def _update(self, step: int, images: Tensor, targets: Tensor) -> tuple[Row, Tensor, Tensor | None]:
        """One step; what of it is known at once, its loss and the gradient's norm."""
        recipe, parallel = self.recipe, self.parallel
        self.parallel.seed(zlib.crc32(f"{recipe.seed} {step}".encode()))
        rate = learning_rate(recipe, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, targets = (t.to(parallel.device, non_blocking=True) for t in (images, targets))
        total = torch.zeros((), device=parallel.device)
        parts = list(zip(images.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True))
        for number, (x, y) in enumerate(parts):
            with parallel.accumulating(self.wrapped, last=number == len(parts) - 1):
                with self.autocast():
                    logits = self.wrapped(x)
                loss = F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing) / len(parts)
                loss.backward()
            total += loss.detach()
        norm = parallel.clip(self.model, recipe.clip) if recipe.clip else None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.images += len(images) * parallel.data_world
        row: Row = {"step": step + 1, "epoch": round((step + 1) / self.batches.steps, 4), "lr": rate}
        return row, total, norm

    def _seen(self, seconds: float) -> list[Row]:
        """Rows of the steps since the last look, which took that long; a loss that is no number ends the run."""
        rows = [row for row, _, _ in self._unseen]
        losses = self.parallel.mean(torch.stack([loss for _, loss, _ in self._unseen])).tolist()
        norms = [float(norm) if norm is not None else None for _, _, norm in self._unseen]
        self.seconds += seconds
        size = self.recipe.batch_size
        for row, loss, norm in zip(rows, losses, norms, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"fastvit: the loss is {loss} at step {row['step']} (lr {row['lr']:.3g}): nothing of it is kept; "
                    f"{_newest(self.run)}. A lower lr, more warmup_steps or clip may help"
                )
            row["loss"] = loss
            if norm is not None:
                row["grad_norm"] = norm
            row["images_per_s"] = round(size * len(rows) / max(seconds, 1e-9), 2)
            row["seconds"] = round(self.seconds, 3)
        self._unseen.clear()
        return rows

    def _evaluate(self, row: Row) -> Row:
        self._tell(row, "evaluating")
        assert self.test is not None
        with nullcontext() if self.average is None else self.average.in_place():
            self.evaluation = measured(
                self.wrapped, self.test.epoch(0), self.autocast, self.parallel.device, self.parallel.sum
            )
        return {"test_loss": self.evaluation.loss, "top1": self.evaluation.top1, "top5": self.evaluation.top5}

    def evaluate(self) -> Evaluation | None:
        """The last step's evaluation, made now if this process made none."""
        if self.evaluation is None and self.test is not None:
            self._evaluate({"step": self.steps})
        return self.evaluation

    def _tell(self, row: Row, stage: str = "") -> None:
        if self._show is not None and self.parallel.is_main:
            self._show(Progress(row, self.steps, stage))

    def save(self, step: int) -> None:
        """The checkpoint of a step."""

        def write(folder: Path) -> None:
            save_state(folder, self.parallel, self.model, self.optimizer, self.average)

        facts = {"steps": self.steps, "seconds": round(self.seconds, 3), "images": self.images}
        checkpoints.save(self.run, step, facts, write, self.recipe.keep, self.parallel)

    def finish(self) -> None:
        """model.safetensors, with the averaged weights where there are any; the bare model has them from now on."""
        if self.average is not None:
            self.average.put()
        state = self.parallel.full_state(self.model)
        if self.parallel.is_main:
            checkpoints.write_whole(self.run / MODEL, state)
        self.parallel.barrier()


def _newest(run: Path) -> str:
    whole = checkpoints.folders(run)
    return f"the last checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
