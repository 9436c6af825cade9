"""Attention maps of a model that stays fused: the rows of the softmax that are asked for, computed beside it.

A fused forward never holds the softmax. A hook on each block, which leaves the block fused, sees the tokens that go in;
norm, projections of queries and keys, and those rows of softmax(scale · q kᵀ + mask) are computed from them once more.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .integrations import ADAPTERS, Attended, BlockCall, Options, Plan, loaded
from .integrations.embeddings import Embedding, embedding_of
from .parts import AttentionParts, Norm, parts_of
from .positions import relative_logits
from .prepack import Released

Queries = Literal["cls", "all"] | int | Sequence[int] | Sequence[tuple[int, int]]
Heads = Literal["mean"] | int | Sequence[int] | None


def attention_maps(
    model: nn.Module,
    x: Tensor | Mapping[str, Any],
    layers: int | Sequence[int] | None = None,
    queries: Queries = "cls",
    *,
    heads: Heads = None,
    grad: bool = False,
    **forward_kwargs: Any,
) -> list[Tensor]:
    """The attention of one forward pass, softmax(scale · q kᵀ + mask) (paper, appendix A, equation 7).

    The model runs as it is, accelerated or not, in its own mode, dtype and autocast, and what is not asked for is not
    computed: only ``queries="all"`` takes N × N scores. For this pass fused blocks run one by one, and a compiled model
    runs uncompiled. Dropout of the softmax is left out, dropout elsewhere is the model's. Quantised blocks have the
    maps of their original weights, and none where quantize has released those.

    Args:
        model: a timm, transformers or torchvision Vision Transformer, a ``fastvit.VisionTransformer``, a module that
            contains one, or one block. Of a model with several towers, give one (``clip.vision_model``).
        x: the model's input, images (B, C, height, width); a mapping is called as ``model(**x)``.
        layers: which blocks, in the order they are wanted: indices (negative ones from the end), or None for all.
        queries: rows of the softmax: "cls" (the class token's), "all", an index or indices of tokens, prefix tokens
            counted, or (row, column) pairs of patches, as in ``[(3, 5)]``.
        heads: None for all, "mean" over them, an index, or indices.
        grad: record the maps for autograd, as functions of parameters and images. The model's output is computed beside
            them, so it has no gradient with respect to a map.
        forward_kwargs: for the model's forward.

    Returns:
        For each layer a Tensor (B, H, Q, N): H heads (1 for "mean" or one index), Q queries, N tokens, prefix tokens
        first; fp32, fp64 for a model in fp64. Rows sum to 1, but rows that a mask hides whole are 0.

    Raises:
        TypeError: not a module, or a block's call that is not understood. ValueError: no blocks, blocks at several
            places or unknown ones among them; a layer, head or query out of range; no class token. RuntimeError: a
            block was not called once.
    """
    return collect(model, x, layers, queries, heads, grad, forward_kwargs, lambda _, rows: rows)


def collect(
    model: nn.Module,
    x: Tensor | Mapping[str, Any],
    layers: int | Sequence[int] | None,
    queries: Queries,
    heads: Heads,
    grad: bool,
    forward_kwargs: Mapping[str, Any],
    take: Callable[[int, Tensor], Any],
) -> list[Any]:
    """What ``take`` makes of the maps of each layer, given its index and (B, H, Q, N) while the model runs."""
    blocks = attended_blocks(model)
    wanted = _indices("layers", range(len(blocks)) if layers is None else layers, len(blocks))
    rows_of = _rows(model, x, queries)
    _check_heads(heads)
    taken: dict[int, Any] = {}

    def watch(index: int, block: _Block) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index in taken:
                raise RuntimeError(f"fastvit.attention_maps: block {block.name} is called more than once in one pass")
            call = block.call(module, *args, **kwargs)
            if call is None:
                raise TypeError(
                    f"fastvit.attention_maps: cannot read this call of {type(module).__name__} {block.name}"
                )
            with _beside(call.x.device.type):
                taken[index] = take(index, _softmax_rows(*block.parts(module), call, rows_of(call.x.shape[1]), heads))

        hooks.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)

    with ExitStack() as hooks:
        hooks.enter_context(torch.set_grad_enabled(grad and torch.is_grad_enabled()))
        if "torch._dynamo" in sys.modules:
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for index in dict.fromkeys(wanted):
            watch(index, blocks[index])
        model(**x, **forward_kwargs) if isinstance(x, Mapping) else model(x, **forward_kwargs)
    missing = [blocks[index].name for index in wanted if index not in taken]
    if missing:
        raise RuntimeError(f"fastvit.attention_maps: the model did not call {', '.join(missing)} in its forward")
    return [taken[index] for index in wanted]


@contextmanager
def _beside(device: str) -> Iterator[None]:
    """Computing in the dtype asked for, and with nothing saved where a checkpoint around the block would count it."""
    with torch.autocast(device, enabled=False), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


class _Block(NamedTuple):
    """A block by its name in the model, how to read its attention and its call."""

    name: str
    module: nn.Module
    parts: Callable[[Any], tuple[Norm | None, AttentionParts]]
    call: Callable[..., BlockCall | None]


def attended_blocks(model: nn.Module) -> list[_Block]:
    """The blocks of a model whose attention is known, in order.

    Raises:
        TypeError: not a module. ValueError: there are none, or they are of several towers, or unknown ones among them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvit.attention_maps: model must be a torch.nn.Module, got {type(model).__name__}")
    blocks = []
    for name, module in model.named_modules():
        found = _attended(module)
        if found is not None:
            blocks.append(_Block(name or "(model)", module, found.parts, found.call or _plain_call))
    if not blocks:
        raise ValueError(
            f"fastvit.attention_maps: found no block of {', '.join(ADAPTERS)} or fastvit whose attention is "
            f"known in {type(model).__name__}"
        )
    places = list(dict.fromkeys(_place(block.name) for block in blocks))
    if len(places) > 1:
        raise ValueError(
            f"fastvit.attention_maps: {type(model).__name__} has blocks at {len(places)} places, {', '.join(places)}: "
            "give the part of it that contains one of them"
        )
    if (unknown := _unknown_sibling(model, blocks)) is not None:
        raise ValueError(
            f"fastvit.attention_maps: {unknown} of {type(model).__name__} stands among blocks whose attention is "
            "known, and its own is not"
        )
    return blocks


def _unknown_sibling(model: nn.Module, blocks: list[_Block]) -> str | None:
    """What looks like a block and stands among them, but is not known: their indices would not be the model's."""
    known, place = {id(block.module) for block in blocks}, _place(blocks[0].name)
    if id(model) in known:
        return None
    for name, module in model.named_modules():
        if _place(name) == place:
            inside = list(module.modules())
            looks = any(re.search(r"Attention|Block|Layer(?!Norm|Scale)", type(m).__name__) for m in inside)
            if looks and known.isdisjoint(map(id, inside)):
                return f"{type(module).__name__} {name}"
    return None


def _attended(module: nn.Module) -> Attended | None:
    if isinstance(module, layers.Block):
        return Attended(_norm_and_attention(parts_of))
    for adapter in loaded():
        found = adapter.plan(module, Options())
        if isinstance(found, Plan) and found.parts is not None:
            return Attended(_norm_and_attention(found.parts), found.call)
        if hasattr(adapter, "attention_of") and (known := adapter.attention_of(module)) is not None:
            return known
    return None


def _norm_and_attention(parts: Callable[[Any], Any]) -> Callable[[Any], tuple[Norm | None, AttentionParts]]:
    def read(block: Any) -> tuple[Norm | None, AttentionParts]:
        its = parts(block)
        return its.norm1, its.attention

    return read


def _plain_call(block: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> BlockCall:
    return BlockCall(x, attn_mask, is_causal)


def _place(name: str) -> str:
    """Where a block's list is, wrappers (``_orig_mod``, ``_fsdp_wrapped_module``) left out."""
    return re.sub(r"(^|\.)_\w+", "", name).rpartition(".")[0] or "(model)"


def _softmax_rows(
    norm: Norm | None, attention: AttentionParts, call: BlockCall, rows: slice | list[int], heads: Heads
) -> Tensor:
    """Rows (B, H, Q, N) of the softmax of a block's call."""
    x = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    x = _normalised(x, norm)
    q, k = _projected(attention, x[:, rows], 0, attention.q_norm), _projected(attention, x, 1, attention.k_norm)
    if call.rotate is not None:  # by position: each query goes to its own
        everywhere = q if isinstance(rows, slice) else q.new_zeros(k.shape).index_copy(2, _index(rows, q), q)
        q, k = call.rotate(everywhere, k)
        q = q[:, :, rows]
    number = q.shape[1]
    chosen = slice(None) if heads is None or heads == "mean" else _indices("heads", heads, number)
    scores = q[:, chosen] @ k[:, chosen].mT * attention.scale
    if attention.relative_keys is not None:
        scores = scores + relative_logits(q, attention.relative_keys, attention.scale, rows)[:, chosen]
    if call.mask is not None:
        scores = _masked(scores, call.mask, rows, chosen)
    if call.causal:
        position = torch.arange(x.shape[1], device=x.device)
        scores = scores.masked_fill(position > position[rows, None], -torch.inf)
    if call.mask is None:
        maps = scores.softmax(-1)
    else:
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        maps = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return maps.mean(1, keepdim=True) if heads == "mean" else maps


def _normalised(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    weight, bias, eps = norm
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _projected(attention: AttentionParts, x: Tensor, which: int, norm: Norm | None) -> Tensor:
    """Queries (``which`` = 0) or keys (1), (B, H, N, E), from tokens (B, N, D), normalised."""
    weight, bias = (_one(given, which) for given in (attention.qkv_weights, attention.qkv_biases))
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return _normalised(y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2), norm)


def _one(tensors: tuple[Any, ...], which: int) -> Any:
    """That of queries, keys or values, out of three or a packed one."""
    tensor = tensors[which] if len(tensors) == 3 else tensors[0]
    if isinstance(tensor, Released):
        tensor = tensor.detach()
    return tensor if tensor is None or len(tensors) == 3 else tensor.chunk(3)[which]


def _masked(scores: Tensor, mask: Tensor, rows: slice | list[int], heads: slice | list[int]) -> Tensor:
    """Scores with a boolean mask's False at -inf, or a bias added, of their rows and heads."""
    if mask.dim() > 1 and mask.shape[-2] != 1:
        mask = mask[..., rows, :]
    if mask.dim() > 2 and mask.shape[-3] != 1:
        mask = mask[..., heads, :, :]
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _index(indices: list[int], like: Tensor) -> Tensor:
    return torch.tensor(indices, device=like.device)


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _indices(what: str, given: Any, count: int) -> list[int]:
    """Indices from 0 of one index or several, negative ones from the end."""
    several = [given] if _whole_number(given) else given
    if not isinstance(several, (Sequence, range)) or isinstance(several, str) or not all(map(_whole_number, several)):
        raise TypeError(f"fastvit.attention_maps: {what} must be an integer or integers, got {given!r}")
    if not several or not all(-count <= i < count for i in several):
        raise ValueError(f"fastvit.attention_maps: {what} must be in {-count}..{count - 1}, got {given!r}")
    return [i % count for i in several]


def _check_heads(heads: Heads) -> None:
    if isinstance(heads, str) and heads != "mean":
        raise ValueError(f"fastvit.attention_maps: heads must be None, 'mean', an index or indices, got {heads!r}")


def _rows(model: nn.Module, x: Any, queries: Queries) -> Callable[[int], slice | list[int]]:
    """From the number of tokens to the rows that ``queries`` asks for."""
    if isinstance(queries, str):
        if queries == "all":
            return lambda tokens: slice(None)
        if queries != "cls":
            raise ValueError(f"fastvit.attention_maps: queries must be 'cls', 'all' or indices, got {queries!r}")
        embedding = embedding_of(model)
        if embedding is None or not embedding.class_token:
            why = "whose embedding is unknown" if embedding is None else "which has no class token"
            raise ValueError(
                f"fastvit.attention_maps: queries='cls' for {type(model).__name__}, {why}: give indices of tokens, "
                "(row, column) pairs of patches or 'all'"
            )
        return lambda tokens: [0]
    if isinstance(queries, Sequence) and queries and all(isinstance(one, tuple) for one in queries):
        return _patch_rows(model, x, queries)
    return lambda tokens: _indices("queries", queries, tokens)


def _patch_rows(model: nn.Module, x: Any, queries: Sequence[Any]) -> Callable[[int], list[int]]:
    embedding, (height, width) = image_grid(model, x)
    for patch in queries:
        whole = len(patch) == 2 and all(map(_whole_number, patch))
        if not whole or not (0 <= patch[0] < height and 0 <= patch[1] < width):
            raise ValueError(
                f"fastvit.attention_maps: queries must be (row, column) of {height} x {width} patches, got {patch!r}"
            )

    def rows(tokens: int) -> list[int]:
        if tokens != embedding.prefix + height * width:
            raise ValueError(
                f"fastvit.attention_maps: queries name patches of a grid of {height} x {width} behind "
                f"{embedding.prefix} prefix tokens, but the blocks get {tokens} tokens"
            )
        return [embedding.prefix + row * width + column for row, column in queries]

    return rows


def image_grid(model: nn.Module, x: Any) -> tuple[Embedding, tuple[int, int]]:
    """A model's embedding and how many patches along height and width it makes of images.

    Raises:
        ValueError: the embedding is unknown, or ``x`` holds no images (B, C, height, width).
    """
    embedding = embedding_of(model)
    if embedding is None:
        raise ValueError(f"fastvit: found no embedding of images, or several, in {type(model).__name__}")
    image = x.get("pixel_values") if isinstance(x, Mapping) else x
    if not isinstance(image, Tensor) or image.dim() != 4:
        given = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"fastvit: x must be images (B, C, height, width), got {given}")
    return embedding, embedding.patches(*image.shape[-2:])
