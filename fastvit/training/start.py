"""A run from its beginning to its end: everything is checked, then the loop goes, then the weights are left."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import backends
from ..config import Size, ViTConfig, pair
from ..initialize import zeroed
from ..model import VisionTransformer
from . import checkpoints
from .error import TrainingError
from .evaluation import Evaluation
from .log import Log
from .loop import Loop, Show
from .parallel import Parallel
from .recipe import Recipe, recipe_of
from .run import RESUME, config_for, facts_of, found_checkpoint, write_facts

if TYPE_CHECKING:
    from fastvit.data import Batches, Source


@dataclass(frozen=True)
class Trained:
    """The end of a run.

    model: in eval mode, with the averaged weights where the recipe averages. first: the step that it went on from, 0 at
    the beginning. loss: of the last step. evaluation: on the test images, None without them. seconds, images_per_s: of
    the run's steps, those before it was stopped included, without evaluations and checkpoints. is_main: whether this
    is the first of the processes that trained it.
    """

    model: VisionTransformer
    run: Path
    steps: int
    first: int
    loss: float
    evaluation: Evaluation | None
    seconds: float
    images_per_s: float
    is_main: bool


def train(
    data: "str | Source",
    out: str | PathLike[str],
    *,
    model: str | ViTConfig = "vit_base_patch16_224",
    recipe: str | Recipe = "finetune",
    test: "str | Source | None" = "",
    checkpoint: str | PathLike[str] | None = None,
    weights_only: bool | None = None,
    img_size: Size | None = None,
    model_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    device: str = "",
    parallel: str = "auto",
    workers: int | None = None,
    resume: str = "auto",
    tensorboard: bool = False,
    show: Show | None = None,
    **options: Any,
) -> Trained:
    """Train a Vision Transformer on labelled images, from the original's random weights or from a checkpoint.

    ``out`` gets ``config.json`` (model, recipe, data), ``log.csv`` (a row for each step), ``checkpoints/step-000400``
    (weights, averaged weights, the optimiser's state; complete or absent) and at the end ``model.safetensors``. A
    process that was killed goes on, called with the same arguments, from the newest checkpoint, and in one process on a
    CPU computes the same losses to the bit.

    Args:
        data: labelled images, or a place as in :func:`fastvit.data.open_source`.
        out: the run's directory.
        model: a preset's name, or its options; the number of classes is the data's.
        recipe: "pretrain" or "finetune", or one made; ``options`` replace some of it.
        test: images to evaluate on; "" the place's own test split, None nothing.
        checkpoint: weights to begin with, as in :func:`fastvit.load_checkpoint`, with a head of zeros in the place of
            theirs (paper, section 3.2); positions of another resolution are interpolated.
        img_size: in pixels, of the images that the model sees.
        model_options: more options of :class:`fastvit.ViTConfig`.
        backend: of the ops, as in :func:`fastvit.backend`.
        device, parallel: as in :meth:`fastvit.training.parallel.Parallel.start`.
        workers: processes that decode images, as in :class:`fastvit.data.Batches`.
        resume: "auto" goes on where there is a checkpoint, "must" always, "never" refuses a directory that has one.
        tensorboard: write its events, too.
        show: is told how far the run is.
        options: fields of :class:`Recipe`.

    Raises:
        TypeError, ValueError: an argument out of range. DataError, CheckpointError: what cannot be read. TrainingError:
        a directory of another run, a loss that is no number, a checkpoint that cannot be written. KeyboardInterrupt:
        after Ctrl-C, when a checkpoint is written.
    """
    chosen = recipe_of(recipe, **options)
    run = Path(out)
    if resume not in RESUME:
        raise ValueError(f"fastvit: resume must be one of {', '.join(RESUME)}, got {resume!r}")
    checkpoints.safetensors_torch()
    source, tested = _sources(data, test)
    config = config_for(model, chosen, source, img_size, {**_start(checkpoint), **dict(model_options or {})})
    place = data if isinstance(data, str) else ""
    facts = facts_of(config, chosen, source, place, "" if checkpoint is None else str(checkpoint))
    process = Parallel.start(parallel, device)
    generators = [process.device] if process.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(generators), backends.backend(backend):
            found = found_checkpoint(run, facts, resume)
            torch.manual_seed(chosen.seed)
            network = VisionTransformer(config)
            if checkpoint is not None and found is None:
                _fill(network, checkpoint, weights_only)
            batches, tests = (
                None if images is None else _batches(images, config, chosen, process, workers, images is source)
                for images in (source, tested)
            )
            assert batches is not None
            loop = Loop(run, network, chosen, process, batches, tests, show)
            return _ran(loop, found, facts, tensorboard)
    finally:
        process.stop()


def _ran(loop: Loop, found: checkpoints.Checkpoint | None, facts: Mapping[str, Any], tensorboard: bool) -> Trained:
    first = 0 if found is None else loop.resume(found)
    loop.parallel.barrier()
    log = None
    if loop.parallel.is_main:
        write_facts(loop.run, facts)
        log = Log(loop.run, first, tensorboard)
    with contextlib.closing(log) if log is not None else contextlib.nullcontext():
        row = loop.go(first, log)
    evaluation = loop.evaluate()
    loop.finish()
    speed = loop.images / loop.seconds if loop.seconds else 0.0
    loss = float(row.get("loss", float("nan")))
    return Trained(
        loop.model.eval(), loop.run, loop.steps, first, loss, evaluation, loop.seconds, speed, loop.parallel.is_main
    )


def _start(checkpoint: object) -> dict[str, Any]:
    """The original's first weights, or those of a file with a new head of zeros (paper, section 3.2)."""
    return {"weight_init": "jax" if checkpoint is None else "zero_head"}


def _fill(network: VisionTransformer, checkpoint: str | PathLike[str], weights_only: bool | None) -> None:
    """A file's weights, all but the head, which is of zeros even where the file has one for as many classes."""
    from ..checkpoints import load_checkpoint

    load_checkpoint(network, checkpoint, weights_only=weights_only, drop_head=True)
    zeroed(network.head)


def _sources(data: "str | Source", test: "str | Source | None") -> "tuple[Source, Source | None]":
    from fastvit.data import open_source

    source = open_source(data, "train") if isinstance(data, str) else data
    if isinstance(test, str):
        place = test or (data if isinstance(data, str) else "")
        test = open_source(place, "test") if place else None
    if test is not None and list(test.classes) != list(source.classes):
        raise TrainingError(
            f"fastvit: the test images have {len(test.classes)} classes, the others {len(source.classes)}, "
            "and they must be the same ones in the same order"
        )
    return source, test


def _batches(
    source: "Source", config: ViTConfig, recipe: Recipe, process: Parallel, workers: int | None, train: bool
) -> "Batches":
    """This process's share of the images."""
    from fastvit.data import Augmentation, Batches

    shares = process.data_world * recipe.accumulate
    if recipe.batch_size % shares:
        raise TrainingError(
            f"fastvit: batch_size {recipe.batch_size} must be divisible by {process.data_world} processes x "
            f"{recipe.accumulate} parts"
        )
    own = Augmentation()
    if train:
        if len(source) < recipe.batch_size:
            raise TrainingError(f"fastvit: batch_size {recipe.batch_size} is more than the {len(source)} images")
        own = Augmentation(
            crop_scale=recipe.crop_scale,
            flip=recipe.flip,
            shift=recipe.shift,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )
    return Batches(
        source,
        recipe.batch_size // process.data_world,
        size=pair(config.img_size, "img_size"),
        train=train,
        augmentation=own,
        seed=recipe.seed,
        workers=workers,
        rank=process.data_rank,
        world=process.data_world,
    )
