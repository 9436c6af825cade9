"""The model of a run's directory, or of one of its checkpoints."""

from os import PathLike
from pathlib import Path

import torch

from ..config import override
from ..model import VisionTransformer
from . import checkpoints
from .average import Average
from .error import TrainingError
from .parallel import Parallel
from .run import MODEL, model_config, read_facts
from .state import AVERAGED, SHARDED, WEIGHTS, load_weights


def is_run(path: str | PathLike[str]) -> bool:
    """Whether this is a run's directory or a checkpoint in one."""
    place = Path(path)
    return place.is_dir() and read_facts(_run_of(place)) is not None


def load_run(path: str | PathLike[str]) -> VisionTransformer:
    """The model of a run in eval mode: its last weights, or those of its newest checkpoint, averaged where it averages.

    Args:
        path: a run's directory, or ``checkpoints/step-...`` in it.

    Raises:
        TrainingError: no run, one without weights, or damaged ones.
    """
    place = Path(path)
    run = _run_of(place)
    facts = read_facts(run)
    if facts is None:
        raise TrainingError(f"fastvit: {run} is no run's directory: it has no config.json that a run wrote")
    model = VisionTransformer(override(model_config(facts), {"weight_init": "skip"}))
    if place == run and (run / MODEL).exists():
        _load(model, run / MODEL)
        return model.eval()
    found = checkpoints.newest(run) if place == run else checkpoints.opened(place)
    if found is None:
        raise TrainingError(f"fastvit: {run} has no weights yet")
    folder = found.folder
    if (folder / SHARDED).exists():
        average = Average(model, 0.5) if facts["recipe"].get("ema") else None
        tensors = None if average is None else average.tensors
        Parallel("none", torch.device("cpu")).load(folder / SHARDED, model, None, tensors)
        if average is not None:
            average.put()
    else:
        _load(model, folder / (AVERAGED if (folder / AVERAGED).exists() else WEIGHTS))
    return model.eval()


def _run_of(place: Path) -> Path:
    inside = place.name.startswith("step-") and place.parent.name == "checkpoints"
    return place.parent.parent if inside else place


def _load(model: VisionTransformer, path: Path) -> None:
    try:
        load_weights(model, checkpoints.read_tensors(path))
    except Exception as error:  # safetensors has errors of its own
        raise TrainingError(f"fastvit: {path} cannot be read: {error}") from None
