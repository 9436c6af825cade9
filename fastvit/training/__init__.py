"""Training: the paper's recipes as data, one loop that resumes to the bit, and the paper's ways to evaluate.

recipe says what is done, schedule and optimizer how; start checks everything, loop does it, with checkpoints, log and
average beside it; evaluation and probes measure a model; parallel is what one process of several knows.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .error import TrainingError
    from .evaluation import Evaluation, evaluate
    from .probes import few_shot, linear_probe
    from .recipe import RECIPES, Recipe
    from .start import Trained, train
    from .trained import load_run

__all__ = [
    "RECIPES",
    "Evaluation",
    "Recipe",
    "Trained",
    "TrainingError",
    "evaluate",
    "few_shot",
    "linear_probe",
    "load_run",
    "train",
]

_HOMES = {
    "RECIPES": "recipe",
    "Evaluation": "evaluation",
    "Recipe": "recipe",
    "Trained": "start",
    "TrainingError": "error",
    "load_run": "trained",
    "evaluate": "evaluation",
    "few_shot": "probes",
    "linear_probe": "probes",
    "train": "start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
