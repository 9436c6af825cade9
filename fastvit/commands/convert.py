"""`fastvit convert`: a checkpoint of one library for another."""

from pathlib import Path
from typing import Annotated

import typer

from .terminal import UsageError, as_usage_errors, checked_names

LAYOUTS = ("hf", "timm", "torchvision")


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint of any known layout.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write safetensors.")],
    to: Annotated[str, typer.Option(help="hf (transformers), timm or torchvision.")] = "hf",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Allow a .pt or .pth, of which only tensors are unpickled.")
    ] = False,
) -> None:
    """Write a checkpoint under the names, and in the order, of another library."""
    (layout,) = checked_names([to], LAYOUTS, "layout") or [""]
    if not layout:
        raise UsageError(f"unknown layout '': expected {', '.join(LAYOUTS)}")
    with as_usage_errors(ValueError, TypeError, RuntimeError, ImportError):
        from fastvit import checkpoints

        checkpoints.convert_file(source, target, to=layout, overwrite=overwrite, weights_only=weights_only or None)
    print(f"{target}")
