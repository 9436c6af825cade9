"""From one library's names to another's, by way of timm's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import jax
from .error import CheckpointError, shortened
from .layout import Layout, Translated, from_timm, to_timm
from .openai import OPENAI
from .timm import TIMM
from .torchvision import TORCHVISION
from .transformers import CLIP, DINOV2, DINOV2_ON_DISK, VIT, VIT_ON_DISK

LAYOUTS = (VIT, VIT_ON_DISK, DINOV2, DINOV2_ON_DISK, CLIP, TORCHVISION, OPENAI, TIMM)
SOURCES = ("auto", "timm", "transformers", "hf", "torchvision", "npz", "openai")
TARGETS = ("timm", "transformers", "hf", "transformers_on_disk", "torchvision")

# a wrapper's prefix that stands before every name
WRAPPERS = ("module.", "_orig_mod.")


def convert_state_dict(state_dict: Mapping[str, Any], src: str = "auto", dst: str = "timm") -> dict[str, Tensor]:
    """The same weights under another library's names.

    Args:
        state_dict: tensors by name, of any known layout: timm (and the original DeiT, DINOv2 and MAE), transformers'
            ViT, DeiT, DINOv2 (with registers or a gated MLP), CLIP and SigLIP towers under the names in memory or those
            on disk, torchvision, OpenAI's CLIP and open_clip, or the arrays of an original ``.npz``.
        src: "auto", or the library: "timm", "transformers" (= "hf"), "torchvision", "npz", "openai".
        dst: "timm", which are fastvit's names too, "transformers" (= "hf": as a model of version 5 has them),
            "transformers_on_disk" (as every version reads and writes them) or "torchvision".

    Returns:
        A new dictionary. Tensors may share memory with the given ones. Only names and the grouping of rows change: the
        eps of norms and the activation belong to the model. DINOv2's position of the class token goes into the token
        where registers follow it, as in timm; text towers are left out.

    Raises:
        CheckpointError: an unknown layout (the message says what was looked for), a name without a place in ``dst``.
    """
    for name, value, valid in (("src", src, SOURCES), ("dst", dst, TARGETS)):
        if value not in valid:
            raise ValueError(f"fastvit.convert_state_dict: {name} must be one of {valid}, got {value!r}")
    found, _, _ = translate(as_tensors(state_dict), src)
    if found.left:
        raise CheckpointError(f"fastvit.convert_state_dict: no place is known for {shortened(found.left)}")
    layout, prefix = target(found.tensors, dst)
    if layout is not TIMM and "pos_embed" not in found.tensors:
        raise CheckpointError(f"fastvit.convert_state_dict: {layout.name} has no model without a table of positions")
    done = from_timm(found.tensors, layout, prefix)
    if done.left:
        names = shortened(sorted({name for part in done.left for name in found.origin.get(part, (part,))}))
        raise CheckpointError(f"fastvit.convert_state_dict: {layout.name} has no place for {names}")
    return done.tensors


def as_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors, or what NumPy calls arrays, by name, without a wrapper's prefix.

    Raises:
        TypeError: something else.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"fastvit: a state_dict must map names to tensors, got {type(state_dict).__name__}")
    found = {}
    for name, value in state_dict.items():
        if not isinstance(name, str) or not (isinstance(value, Tensor) or hasattr(value, "__array_interface__")):
            raise TypeError(f"fastvit: a state_dict must map names to tensors, got {name!r}: {type(value).__name__}")
        found[name] = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return unwrapped(found)


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel or torch.compile put before every name."""
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return unwrapped({name.removeprefix(wrapper): tensor for name, tensor in state.items()})
    return dict(state)


def translate(state: Mapping[str, Tensor], src: str = "auto") -> tuple[Translated, str, str]:
    """Under timm's names, with the way the source resizes positions and the library it comes from.

    Raises:
        CheckpointError: no known layout, or more than one.
    """
    library = {"hf": "transformers"}.get(src, src)
    if library in ("auto", "npz"):
        places = jax.prefixes(state)
        if len(places) == 1:
            return jax.to_timm(state, places[0]), "npz", "npz"
    layout, prefix = recognise(state, library)
    found = to_timm(state, layout, prefix)
    way = layout.resize
    if "register_tokens" in "".join(found.origin.get("reg_token", ())):
        way = "timm"
    elif layout is TIMM and "mask_token" in found.tensors and found.tensors["mask_token"].dim() == 2:  # MAE's has three
        way = "dinov2"
    return found, way, layout.src


def recognise(state: Mapping[str, Tensor], library: str = "auto") -> tuple[Layout, str]:
    """The layout of a state_dict and the prefix it stands below.

    Raises:
        CheckpointError: none, or several; the message says what was looked for and what was there.
    """
    candidates = [layout for layout in LAYOUTS if library in ("auto", layout.src)]
    found = [(layout, prefix) for layout in candidates for prefix in layout.prefixes(state)]
    if len(found) == 1:
        return found[0]
    if found:
        places = shortened(f"{layout.name} below {prefix!r}" for layout, prefix in found)
        raise CheckpointError(f"fastvit: several vision transformers in one state_dict: {places}")
    looked = "; ".join(f"{layout.name}: {' and '.join(layout.markers)}" for layout in candidates)
    if library in ("auto", "npz"):
        looked += f"; {jax.NAME}: {jax.MARKER}"
    raise CheckpointError(
        f"fastvit: unknown layout. Looked for {looked}. Found {shortened(sorted(state)) or 'nothing'}"
    )


def target(state: Mapping[str, Tensor], dst: str) -> tuple[Layout, str]:
    """The layout and prefix under which ``dst`` keeps a model of these tensors (timm's names)."""
    if dst == "timm":
        return TIMM, ""
    if dst == "torchvision":
        return TORCHVISION, ""
    disk, headed = dst == "transformers_on_disk", "head.weight" in state
    if "norm_pre.weight" in state or "attn_pool.latent" in state:
        return CLIP, "vision_model." if headed or disk else ""
    if "blocks.0.ls1.gamma" in state:
        return (DINOV2_ON_DISK if disk else DINOV2), ""
    base = "deit." if "dist_token" in state else "vit."
    return (VIT_ON_DISK if disk else VIT), base if headed else ""
