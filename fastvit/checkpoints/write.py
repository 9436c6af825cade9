"""Files in another layout: safetensors, whole or not at all."""

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .convert import target, translate, unwrapped
from .error import CheckpointError, shape_of, shortened
from .files import DTYPES, open_checkpoint
from .hf_config import HIDDEN_ACTS, hf_config
from .layout import from_timm

FORMATS = {"hf": "transformers_on_disk", "timm": "timm", "torchvision": "torchvision"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def convert_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str = "hf",
    overwrite: bool = False,
    weights_only: bool | None = None,
    num_heads: int | None = None,
    activation: str | None = None,
) -> str:
    """Write a checkpoint of any known layout as another library's file.

    Args:
        src: as in :func:`fastvit.load_checkpoint`.
        dst: for "hf" a directory, which gets ``model.safetensors`` and ``config.json`` and is what ``from_pretrained``
            takes; for "timm" (fastvit's names too) and "torchvision" a ``.safetensors`` file.
        to: "hf", "timm" or "torchvision".
        overwrite: replace files that are there.
        weights_only: True reads ``.pt``, ``.pth`` and ``.bin``.
        num_heads: H for ``config.json``, which no weight tells; None takes it from the source (a config.json beside it,
            the shape of an ``.npz`` kernel) or from the published model of that width.
        activation: transformers' name of it for ``config.json``; None takes that of the library the file comes from.

    Returns:
        One sentence about what was written.

    Raises:
        CheckpointError: a file that cannot be read or translated; FileExistsError: ``dst`` is there; ValueError: an
            argument out of range. Nothing is written then.
    """
    if to not in FORMATS:
        raise ValueError(f"fastvit.convert_file: to must be one of {tuple(FORMATS)}, got {to!r}")
    if activation is not None and activation not in HIDDEN_ACTS:
        raise ValueError(f"fastvit.convert_file: activation must be one of {HIDDEN_ACTS}, got {activation!r}")
    folder = Path(dst)
    weights = folder / "model.safetensors" if to == "hf" else folder
    if weights.suffix != ".safetensors":
        raise ValueError(f"fastvit.convert_file: dst must end in .safetensors, got {str(dst)!r}")
    places = [weights, *([folder / "config.json"] if to == "hf" else [])]
    there = [str(place) for place in places if place.exists()]
    if to == "hf" and folder.is_file():
        raise FileExistsError(f"fastvit.convert_file: {folder} is a file; transformers wants a directory")
    if there and not overwrite:
        raise FileExistsError(f"fastvit.convert_file: {', '.join(there)} exists; overwrite=True replaces it")
    source = open_checkpoint(src, weights_only)
    try:
        headers = unwrapped(source.headers())
        translate(headers)  # of no known layout: say so before anything is read
        state = unwrapped(source.read(source.entries))
        found, _, library = translate(state)
        layout, prefix = target(found.tensors, FORMATS[to])
        done = from_timm(found.tensors, layout, prefix)
        lost = [name for hub in done.left for name in found.origin[hub]] + found.left
        if lost:
            raise CheckpointError(f"fastvit: {layout.name} has no place for {shortened(lost)}")
        config = None
        if to == "hf":
            config = hf_config(found.tensors, headers, library, source.config, num_heads, activation)
    except CheckpointError as error:
        raise CheckpointError(f"fastvit.convert_file: {src}: {str(error).removeprefix('fastvit: ')}") from error
    _replace(places, done.tensors, config)
    numbers = sum(tensor.numel() for tensor in done.tensors.values())
    made = ""
    if config:  # heads and activation are not in the weights: what was taken is said
        made = " of {architectures[0]} ({num_attention_heads} heads, {hidden_act})".format(**config)
    return f"{len(done.tensors)} tensors, {numbers / 1e6:.1f} M parameters{made}, from {library} to {folder}"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors as a ``.safetensors`` file, those of the widest dtype first, as its own library lays them out."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape_of(tensor), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous()
            size = flat.numel() * flat.dtype.itemsize
            file.write((ctypes.c_char * size).from_address(flat.data_ptr()) if size else b"")


def _replace(places: list[Path], tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> None:
    """Write beside the places, then rename."""
    made = not places[0].parent.exists()
    places[0].parent.mkdir(parents=True, exist_ok=True)
    drafts = [place.with_name(f".{place.name}.{os.getpid()}.part") for place in places]
    try:
        write_safetensors(drafts[0], tensors)
        if config is not None:
            drafts[1].write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for draft, place in zip(drafts, places, strict=True):
            os.replace(draft, place)
    except BaseException:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        if made:
            places[0].parent.rmdir()
        raise
