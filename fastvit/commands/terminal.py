"""What the commands share: how options are checked, how progress is shown, how a request is refused."""

import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import rich.console
import rich.progress
import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class UsageError(Exception):
    """A request that cannot be served; its message is printed without a traceback."""


def benchmarks(module: str) -> Any:
    """A module of the benchmark suite, which costs a second to import and is a folder type checkers do not see."""
    return importlib.import_module(f"fastvit.benchmarks.{module}")


def split_commas(values: Iterable[str] | None) -> list[str]:
    """The parts of an option that was repeated, or given as one value with commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def checked_names(values: Iterable[str] | None, valid: Sequence[str], kind: str) -> list[str]:
    """The names that were asked for, each checked; a wrong one is answered with the close or the valid ones."""
    names = list(dict.fromkeys(split_commas(values)))
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=4, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close and len(valid) > 8 else f"expected {', '.join(valid)}"
            raise UsageError(f"unknown {kind} {name!r}: {hint}")
    return names


def checked_name(value: str, valid: Sequence[str], kind: str, default: str = "") -> str:
    """The one name that was asked for, checked as above; ``default`` for "", which nobody has to type."""
    if "," in value:
        raise UsageError(f"{kind} must be one name, got {value!r}")
    return next(iter(checked_names([value], valid, kind)), default)


def backend_names() -> list[str]:
    """What --backend takes."""
    from fastvit import backends

    return ["auto", *backends.BACKENDS]


def checked_positives(values: Iterable[str] | None, kind: str) -> list[int]:
    """The numbers that were asked for, each at least 1."""
    wrong = [text for text in split_commas(values) if not text.isdecimal() or int(text) < 1]
    if wrong:
        raise UsageError(f"{kind} must be a positive whole number, got {wrong[0]!r}")
    return list(dict.fromkeys(int(text) for text in split_commas(values)))


def torch_device(name: str) -> Any:
    """The device of that name; "" is a GPU where torch has one."""
    import torch

    if name not in ("", "cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}: expected cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch finds no usable GPU")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def reason(error: BaseException) -> str:
    """What an exception says, an error of the system without its number: "place: No space left on device"."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


@contextmanager
def as_usage_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, raised inside, become a UsageError that speaks of options, not of arguments."""
    try:
        yield
    except kinds as error:
        text = re.sub(r"^fastvit(\.\w+)*: ", "", reason(error)).replace(
            "; drop_head=True keeps the model's own head", ""
        )
        for argument in ("weights_only", "overwrite"):
            text = text.replace(f"{argument}=True", f"--{argument.replace('_', '-')}")
        raise UsageError(text) from None


@contextmanager
def progress(total: int) -> Iterator[Callable[[float, str, str], None]]:
    """A bar on stderr while stderr is a terminal; yields show(how many of the total are done, what now, stage)."""
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.fields[stage]}"),
        rich.progress.TimeElapsedColumn(),
    )
    # stdout may be a pipe, and what is printed there meanwhile must go there
    options = {"transient": True, "redirect_stdout": False, "disable": not console.is_terminal}
    with rich.progress.Progress(*columns, console=console, **options) as bar:
        task = bar.add_task("starting", total=float(total), stage="")

        def show(done: float, doing: str, stage: str = "") -> None:
            bar.update(task, completed=done, description=doing, stage=stage)

        yield show


def printable(text: object) -> str:
    """A file's name or a label on one line, whatever is in it: no control characters, no broken encoding."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))


def finite(value: object) -> object:
    """The value, or None in place of a number that JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
