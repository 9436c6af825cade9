"""The original .npz of google-research/vision_transformer, hybrids included, and big_vision's.

Kernels are stored (in, out) or (height, width, in, out), those of attention with a dimension for the heads.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from .error import CheckpointError, shape_of
from .layout import Translated, joined

NAME = "the original .npz of google-research/vision_transformer or big_vision"
MARKER = "embedding/kernel"

_RENAMED = {
    "embedding": "patch_embed.proj",
    "cls": "cls_token",
    "pos_embedding": "pos_embed",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "Transformer/encoder_norm": "norm",
    "pre_logits": "pre_logits.fc",
    "head": "head",
    "MAPHead_0/probe": "attn_pool.latent",
    "MAPHead_0/LayerNorm_0": "attn_pool.norm",
}
# the original numbers the parts of a block by their order among all of them, big_vision each kind by itself
_PARTS = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "LayerNorm_2": "norm2",
    "MlpBlock_0": "mlp",
    "MlpBlock_3": "mlp",
    "MultiHeadDotProductAttention_0": "attn",
    "MultiHeadDotProductAttention_1": "attn",
}
MOST_BLOCKS = 1000
_ATTENTION = r"(?:Transformer/encoderblock_(\d+)|(MAPHead_0))/MultiHeadDotProductAttention_[01]/(query|key|value|out)"


def prefixes(names: Mapping[str, Tensor]) -> list[str]:
    """What stands before the image tower's names: nothing, opt/target/, params/, params/img/, img/."""
    return [
        name.removesuffix(MARKER)
        for name in names
        if name.endswith(MARKER) and (name == MARKER or name[: -len(MARKER)].endswith("/"))
    ]


def to_timm(state: Mapping[str, Tensor], prefix: str) -> Translated:
    """A JAX parameter tree, flattened with "/", under timm's names and in PyTorch's order of dimensions.

    Raises:
        CheckpointError: a kernel with a number of dimensions that its kind does not have, or a part of one is missing.
    """
    found, parts = Translated(), _Parts()
    stem = "patch_embed.backbone." + ("stem." if f"{prefix}block1/unit1/conv1/kernel" in state else "")
    for full, tensor in state.items():
        name = full.removeprefix(prefix)
        if not full.startswith(prefix):
            continue  # a text tower, the optimiser
        if name.startswith("Transformer/encoderblock/"):  # all blocks in one tensor
            _need(tensor, (2, 3, 4), full)
            if tensor.shape[0] > MOST_BLOCKS:
                raise CheckpointError(f"fastvit: {full!r} has {tensor.shape[0]} blocks, at most {MOST_BLOCKS} can be")
            for block, one in enumerate(tensor.unbind(0)):
                if not _place(name.replace("encoderblock/", f"encoderblock_{block}/"), one, full, stem, found, parts):
                    found.left.append(full)
                    break
        elif not _place(name, tensor, full, stem, found, parts):
            found.left.append(full)
    parts.join(found)
    return found


class _Parts(dict[str, dict[str, tuple[Tensor, str]]]):
    """Query, key and value wait here for each other: timm's name -> part -> (tensor, original name)."""

    def join(self, found: Translated) -> None:
        for name, parts in self.items():
            module, leaf = name.rsplit(".", 1)
            wanted = ("query", "key", "value")
            missing = [part for part in wanted if part not in parts]
            tensors = [tensor for tensor, _ in parts.values()]
            origin = [original for _, original in parts.values()]
            if missing:
                raise CheckpointError(f"fastvit: the {missing[0]} beside {origin[0]!r} is missing")
            if len({shape_of(tensor) for tensor in tensors}) > 1:
                raise CheckpointError(f"fastvit: {', '.join(origin)} must have one shape")
            q, k, v = (parts[part][0] for part in wanted)
            if module.startswith("attn_pool"):
                found.add([f"attn_pool.q.{leaf}"], [q], [parts["query"][1]])
                found.add([f"attn_pool.kv.{leaf}"], [joined([k, v])], [parts["key"][1], parts["value"][1]])
            else:
                found.add([name], [joined([q, k, v])], origin)


def _place(name: str, tensor: Tensor, full: str, stem: str, found: Translated, parts: _Parts) -> bool:
    """Put one tensor where it belongs; False when it is of no known name."""
    if name in _RENAMED:  # without a leaf
        found.add([_RENAMED[name]], [tensor], [full])
        return True
    module, _, leaf = name.rpartition("/")
    if leaf not in ("kernel", "scale", "bias"):
        return False
    ours = "bias" if leaf == "bias" else "weight"
    attention = re.fullmatch(_ATTENTION, module)
    if attention:
        block, _, part = attention.groups()
        base = f"blocks.{int(block)}.attn" if block else "attn_pool"
        if part == "out":
            found.add([f"{base}.proj.{ours}"], [_output(tensor, leaf, full)], [full])
        else:
            parts.setdefault(f"{base}.qkv.{ours}", {})[part] = (_heads(tensor, leaf, full), full)
        return True
    target = _module(module, stem)
    if target is None:
        return False
    found.add([f"{target}.{ours}"], [_kernel(tensor, leaf, full)], [full])
    return True


def _module(module: str, stem: str) -> str | None:
    """timm's name of a module that is no attention."""
    if module in _RENAMED:
        return _RENAMED[module]
    if module in ("conv_root", "gn_root"):
        return stem + ("conv" if module == "conv_root" else "norm")
    if match := re.fullmatch(r"Transformer/encoderblock_(\d+)/(LayerNorm_\d|MlpBlock_\d)(?:/Dense_([01]))?", module):
        block, part, dense = match.groups()
        fits = part in _PARTS and part.startswith("Mlp") == (dense is not None)
        return f"blocks.{int(block)}.{_PARTS[part]}" + (f".fc{int(dense) + 1}" if dense else "") if fits else None
    if match := re.fullmatch(r"MAPHead_0/MlpBlock_0/Dense_([01])", module):
        return f"attn_pool.mlp.fc{int(match[1]) + 1}"
    if match := re.fullmatch(r"block(\d+)/unit(\d+)/(conv|gn)(_proj|[123])", module):
        stage, unit, kind, which = match.groups()
        kind = "conv" if kind == "conv" else "norm"
        unit = f"patch_embed.backbone.stages.{int(stage) - 1}.blocks.{int(unit) - 1}."
        return unit + (f"downsample.{kind}" if which == "_proj" else kind + which)
    return None


def _need(tensor: Tensor, ranks: tuple[int, ...], full: str) -> None:
    if tensor.dim() not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise CheckpointError(f"fastvit: {full!r} must have {wanted} dimensions, got shape {shape_of(tensor)}")


def _kernel(tensor: Tensor, leaf: str, full: str) -> Tensor:
    """Dense (in, out) as (out, in), convolution (height, width, in, out) as (out, in, height, width), else (D,)."""
    if leaf != "kernel":
        return tensor.flatten()  # group norms come as (1, 1, 1, D)
    _need(tensor, (2, 4), full)
    return tensor.t() if tensor.dim() == 2 else tensor.permute(3, 2, 0, 1)


def _heads(tensor: Tensor, leaf: str, full: str) -> Tensor:
    """Query, key or value: (D, H, E) as (H·E, D), bias (H, E) as (H·E,)."""
    _need(tensor, (3,) if leaf == "kernel" else (2,), full)
    return tensor.flatten(1).t() if leaf == "kernel" else tensor.flatten()


def _output(tensor: Tensor, leaf: str, full: str) -> Tensor:
    """The projection behind attention: (H, E, D) as (D, H·E)."""
    _need(tensor, (3,) if leaf == "kernel" else (1,), full)
    return tensor.flatten(0, 1).t() if leaf == "kernel" else tensor
