"""`fastvit convert`: a checkpoint of one library for another."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from .terminal import Json, as_usage_errors, checked_name

LAYOUTS = ("hf", "timm", "torchvision")


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint of any known layout.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A directory for hf, else a .safetensors file.")],
    to: Annotated[str, typer.Option(help="hf (transformers), timm or torchvision.")] = "hf",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Allow a .pt or .pth, of which only tensors are unpickled.")
    ] = False,
    num_heads: Annotated[int, typer.Option(min=0, help="Heads, for hf, of a model of no published width.")] = 0,
    activation: Annotated[str, typer.Option(help="transformers' name of it, for hf.  [default: the source's]")] = "",
    json: Json = False,
) -> None:
    """Write a checkpoint under the names, and in the order, of another library."""
    layout = checked_name(to, LAYOUTS, "layout", "hf")
    with as_usage_errors(ValueError, OSError, RuntimeError, ImportError):
        from fastvit.checkpoints import convert_file

        told = convert_file(
            source,
            target,
            to=layout,
            overwrite=overwrite,
            weights_only=weights_only or None,
            num_heads=num_heads or None,
            activation=activation or None,
        )
    print(json_module.dumps({"written": str(target), "summary": told}) if json else told)
