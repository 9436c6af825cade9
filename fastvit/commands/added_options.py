"""Options that several commands have, given to them from the one place that names and explains them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

Command = Callable[..., None]


def with_options(
    command: Command, into: str, added: Mapping[str, tuple[Any, Any]], gather: Callable[..., Any]
) -> Command:
    """The command with more options; what is given of them reaches it as one argument.

    Args:
        into: the name of that argument, ``gather(**given)``.
        added: (annotation, default) of each option; one that the command has itself is left out.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != into]
    names = [name for name in added if name not in {p.name for p in own}]

    def called(**given: Any) -> None:
        gathered = gather(**{name: given.pop(name) for name in names})
        command(**given, **{into: gathered})

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=kind) for p in own] + [
        inspect.Parameter(name, kind, default=added[name][1], annotation=added[name][0]) for name in names
    ]
    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called
