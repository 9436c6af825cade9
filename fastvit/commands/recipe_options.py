"""A recipe's fields as options of a command, from the one place that names and explains them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from .terminal import UsageError


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of a recipe; those given reach it as the mapping ``recipe_options``."""
    from fastvit.training.recipe import RECIPES, Recipe  # data alone

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "recipe_options"]
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _asked(field.type) | None,
                typer.Option(help=f"{field.metadata['help']}  [{_defaults(field.name, RECIPES)}]"),
            ],
        )
        for field in fields(Recipe)
    ]
    names = {parameter.name for parameter in added}

    def called(**given: Any) -> None:
        recipe_options = {name: _read(name, given.pop(name)) for name in names if given.get(name) is not None}
        command(**{name: value for name, value in given.items() if name not in names}, recipe_options=recipe_options)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


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
