"""A recipe's fields as options of a command."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from .added_options import Command, with_options
from .terminal import UsageError


def with_recipe_options(command: Command) -> Command:
    """The command with an option for each field of a recipe; those given reach it as the mapping ``recipe_options``."""
    from fastvit.training.recipe import RECIPES, Recipe  # data alone

    added = {
        field.name: (
            Annotated[
                _asked(field.type) | None,
                typer.Option(help=f"{field.metadata['help']}  [{_defaults(field.name, RECIPES)}]"),
            ],
            None,
        )
        for field in fields(Recipe)
    }
    return with_options(command, "recipe_options", added, _given)


def _given(**options: Any) -> dict[str, Any]:
    return {name: _read(name, value) for name, value in options.items() if value is not None}


def _defaults(name: str, recipes: Mapping[str, Any]) -> str:
    """A field's value in each recipe."""
    values = {recipe: getattr(options, name) for recipe, options in recipes.items()}
    same = len(set(values.values())) == 1
    shown = [("default" if same else recipe, value) for recipe, value in values.items()][: 1 if same else None]
    return "; ".join(f"{label}: {','.join(map(str, v)) if isinstance(v, tuple) else v}" for label, v in shown)


def _asked(kind: Any) -> Any:
    """The type of what is typed; a pair is typed as a,b."""
    return kind if kind in (int, float, bool, str) else str


def _read(name: str, value: Any) -> Any:
    if name not in ("betas", "crop_scale"):
        return value
    if name == "crop_scale" and value in ("0", "none"):
        return None
    try:
        pair = tuple(float(part) for part in value.split(","))
    except ValueError:
        pair = ()
    if len(pair) != 2:
        raise UsageError(f"--{name.replace('_', '-')} must be two numbers separated by a comma, got {value!r}")
    return pair
