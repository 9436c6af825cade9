"""A run's directory: what was asked for, and whether what lies there can be gone on with."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Size, ViTConfig, override, preset
from ..figures import in_one_step
from . import checkpoints
from .error import TrainingError
from .recipe import MAY_CHANGE, Recipe

if TYPE_CHECKING:
    from fastvit.data import Source

RESUME = ("auto", "never", "must")
CONFIG, MODEL, LOG = "config.json", "model.safetensors", "log.csv"


def config_for(
    model: str | ViTConfig, recipe: Recipe, source: "Source", img_size: Size | None, options: Mapping[str, Any]
) -> ViTConfig:
    """The model's options for a recipe and for the classes of its data.

    Raises:
        ValueError: an unknown model, or an option out of range; TypeError: an unknown option.
    """
    config = preset(model) if isinstance(model, str) else model
    rates = {"proj_drop_rate": recipe.dropout, "pos_drop_rate": recipe.dropout, "drop_path_rate": recipe.drop_path}
    chosen = {name: rate for name, rate in rates.items() if rate}
    size = {} if img_size is None else {"img_size": img_size}
    return override(config, {"num_classes": len(source.classes), **size, **chosen, **options})


def facts_of(config: ViTConfig, recipe: Recipe, source: "Source", place: str, checkpoint: str) -> dict[str, Any]:
    """What config.json says of a run, as JSON has it."""
    import fastvit

    data = {"place": place, "name": source.name, "images": len(source), "classes": list(source.classes)}
    told = {
        "fastvit": fastvit.__version__,
        "model": asdict(config),
        "recipe": asdict(recipe),
        "data": data,
        "checkpoint": checkpoint,
    }
    return json.loads(json.dumps(told))


def read_facts(run: Path) -> dict[str, Any] | None:
    """The config.json of a run, None where there is none of a run's.

    Raises:
        TrainingError: it cannot be read.
    """
    path = run / CONFIG
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"fastvit: {path} cannot be read: {error}") from None
    return found if isinstance(found, dict) and {"fastvit", "model", "recipe", "data"} <= set(found) else None


def model_config(facts: Mapping[str, Any]) -> ViTConfig:
    """The model's options of a config.json.

    Raises:
        TrainingError: they are none.
    """
    try:
        return override(ViTConfig(), {k: tuple(v) if isinstance(v, list) else v for k, v in facts["model"].items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"fastvit: the model of {CONFIG} is none: {error}") from None


def found_checkpoint(run: Path, facts: Mapping[str, Any], resume: str) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from, None to begin; nothing is written here.

    Args:
        resume: "auto" goes on where there is a checkpoint, "never" begins, in a directory without any, "must" goes on.

    Raises:
        TrainingError: a directory of something else, a checkpoint of another run, none where there must be one or one
            where there must be none.
    """
    if run.exists() and not run.is_dir():
        raise TrainingError(f"fastvit: {run} is a file; a run needs a directory")
    before = read_facts(run)
    foreign = [name for name in (CONFIG, MODEL, LOG) if before is None and (run / name).exists()]
    if foreign:
        raise TrainingError(f"fastvit: {run} has a {foreign[0]} that no run wrote: give the run a directory of its own")
    found = checkpoints.newest(run)
    if found is None:
        if resume == "must":
            raise TrainingError(f"fastvit: {run} has no checkpoint to resume")
        return None
    if resume == "never":
        raise TrainingError(
            f"fastvit: {run} has a run of {found.step} steps, and resume 'never' goes on with none: "
            "give another directory, or remove this one"
        )
    different = [] if before is None else _differences(before, facts)
    if before is None or different:
        what = "; ".join(different) or f"it has no {CONFIG}"
        raise TrainingError(f"fastvit: {run} has another run's checkpoints ({what}): give the run another directory")
    return found


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run that goes on must not change, each as one phrase."""
    phrases = []
    ignored = {"model": ("weight_init", "fix_init"), "recipe": MAY_CHANGE, "data": ("place",)}
    defaults = {"model": asdict(ViTConfig()), "recipe": {f.name: f.default for f in fields(Recipe)}, "data": {}}
    for part, without in ignored.items():
        old, new = ({**json.loads(json.dumps(defaults[part])), **side[part]} for side in (before, now))
        for name in sorted({*old, *new} - set(without)):
            if old.get(name) != new.get(name):
                short = name != "classes"
                detail = f"was {old.get(name)!r}, is {new.get(name)!r}" if short else "were others"
                phrases.append(f"{part}: {name} {detail}")
    return phrases


def write_facts(run: Path, facts: Mapping[str, Any]) -> None:
    """config.json, whole or not at all."""
    with in_one_step(run / CONFIG) as draft:
        draft.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
