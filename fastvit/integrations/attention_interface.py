"""transformers' attention interface: ``attn_implementation="fastvit"`` for every model that looks its attention up.

An attention function is called as ``fn(module, query, key, value, attention_mask, dropout=, scaling=, **kwargs)`` with
(B, H, N, E) tensors and returns (B, N, H, E) and the softmax or None. The rules for ``is_causal`` are those of
``transformers/integrations/sdpa_attention.py``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops

# What some models hand to attention kernels that can do it. Ignored, it would give other numbers.
_UNKNOWN = {
    "softcap": "tanh on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "alibi_slopes": "ALiBi",
    "head_mask": "masks of whole heads",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "block_table": "a paged cache",
    "cache": "a paged cache",
}
# A mask that was made for the call says the same; without one nothing does.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
# transformers reads more than a key in names that contain these
_RESERVED = ("/", "|", "eager", "sdpa", "flash", "flex", "paged")


def collecting_attentions(module: Any = None) -> bool:
    """Whether the transformers model that is running now was asked for ``output_attentions``.

    torch.compile can read this in a whole model; in a part that is compiled alone it cannot, and there a hook on
    ``module``, which transformers would read the maps with, is answer enough.
    """
    from transformers.utils.output_capturing import _active_collector

    if module is not None and torch.compiler.is_dynamo_compiling() and not _active_collector.compiling:
        return bool(module._forward_hooks)
    collected = _active_collector.get()
    return collected is not None and any("attentions" in key for key in collected)


def _refuse(module: Any, what: str) -> ValueError:
    name = type(module).__name__
    return ValueError(f"fastvit.integrations.transformers: {name}: {what}; attn_implementation='eager' may have it")


def _check_options(module: Any, key_tokens: int, mask: Tensor | None, kwargs: Mapping[str, Any]) -> None:
    """Raise for what the operator would have to ignore."""
    for name, meaning in _UNKNOWN.items():
        if kwargs.get(name) is not None:
            raise _refuse(module, f"{name} ({meaning}) is not supported")
    if mask is not None:
        return
    window = kwargs.get("sliding_window")
    if window is not None and key_tokens > window:
        raise _refuse(module, f"sliding_window={window} needs a mask for {key_tokens} keys, and there is none")
    for name in _PACKED:
        if kwargs.get(name) is not None:
            raise _refuse(module, f"{name} packs sequences, which needs a mask, and there is none")


def attention_arguments(
    module: Any,
    query: Tensor,
    attention_mask: Tensor | None,
    kwargs: Mapping[str, Any],
    key_tokens: int | None = None,
) -> tuple[Tensor | None, bool]:
    """What a call of a transformers attention means: the mask, and whether each token sees no later one.

    Args:
        module: the attention module; its ``is_causal`` counts where the call does not say, and is True by default.
        query: (B, H, N, E).
        attention_mask: (B or 1, H or 1, N or 1, S), bool (True = attend) or additive, or None. Causality is in a mask
            already.
        kwargs: the call's other arguments: ``is_causal``, ``position_bias`` (added to the scores), and those that no
            fused attention here knows, which have to be None.
        key_tokens: S where it is not N.

    Returns:
        mask, causal: as :func:`fastvit.ops.attention` takes them.

    Raises:
        ValueError: not a 4-D mask, or arguments that the operator has no equivalent for.
    """
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise _refuse(module, f"attention_mask must be a 4-D Tensor, got {got}")
    _check_options(module, query.shape[2] if key_tokens is None else key_tokens, attention_mask, kwargs)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    # A single query is a decoding step, which sees all keys.
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)
    bias = kwargs.get("position_bias")
    if bias is None:
        return attention_mask, causal
    if attention_mask is None:
        return bias, causal
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, bias, -torch.inf), False
    return bias + attention_mask, False


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale · QKᵀ + mask) in plain PyTorch, for those who ask to see it; differentiable.

    Args:
        query: (B, H, N, E); key: (B, H, S, E).
        mask, causal, scale: as in :func:`fastvit.ops.attention`.

    Returns:
        (B, H, N, S) in query's dtype, the softmax in fp32 (fp64 for fp64). A query that sees no key has zeros.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    scores = scores if query.dtype == torch.float64 else scores.float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if mask is not None:
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0).to(query.dtype)
    return scores.softmax(-1).to(query.dtype)


def _like_query(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped heads repeated for each query head of theirs, one batch of queries for all batches of keys."""
    if key.shape[0] != query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    if key.shape[1] != query.shape[1] and query.shape[1] % key.shape[1] == 0:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    return query, key, value


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What ``attn_implementation="fastvit"`` calls: :func:`fastvit.ops.attention` on transformers' arguments.

    Args:
        module: the attention module.
        query: (B, H, N, E); key, value: (B, H or a divisor of H, S, E), fp64 / fp32 / fp16 / bf16.
        attention_mask: as in :func:`attention_arguments`.
        dropout: rate on the attention weights, which counts whether or not the module trains.
        scaling: of the scores; 1/√E by default.
        kwargs: what else models pass along.

    Returns:
        (B, N, H, E), contiguous, and the attention weights (B, H, N, S), after dropout as in transformers' eager
        attention, if the model or the call was asked for ``output_attentions``, else None.

    Raises:
        ValueError, TypeError: what the operator cannot compute; nothing is left out silently.
    """
    query, key, value = _like_query(query, key, value)
    mask, causal = attention_arguments(module, query, attention_mask, kwargs, key.shape[2])
    if not (kwargs.get("output_attentions") or collecting_attentions(module)):
        out = ops.attention(query, key, value, mask=mask, causal=causal, scale=scaling, dropout=dropout)
        return out.transpose(1, 2).contiguous(), None
    weights = attention_weights(query, key, mask, causal, scaling)
    if dropout > 0.0:  # what is shown is what was multiplied
        weights = torch.nn.functional.dropout(weights, dropout)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
    out = ops.attention(query, key, value, mask=mask, causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), weights


def attention_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask a model makes before its first layer: (B, 1, N, S) bool, True = attend, or None where ``is_causal`` says
    it all. Models that add a relative position bias to it (BEiT) get an additive one: a sum with True is no mask."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    biased = any(getattr(config, f"use_{kind}relative_position_bias", False) for kind in ("", "shared_"))
    return (eager_mask if biased else sdpa_mask)(*args, config=config, **kwargs)


def register(name: str = "fastvit") -> None:
    """Make ``attn_implementation="fastvit"`` known to transformers: the attention, and the masks it takes.

    Works for ``AutoModel.from_config(config, attn_implementation="fastvit")``, ``from_pretrained`` and
    ``model.set_attn_implementation("fastvit")``. Calling it again changes nothing. ``output_attentions=True`` gives the
    softmax, computed for that call beside the kernel; transformers refuses to set it in a finished model's config. A
    token that may see no key at all gives 0, where eager attention averages what it may not see.

    Args:
        name: what models are to call it.

    Raises:
        ImportError: transformers is absent or too old. TypeError, ValueError: a name that is no text, that transformers
            gives a meaning of its own, or that is another implementation's.
    """
    if not isinstance(name, str):
        raise TypeError(f"fastvit.integrations.transformers.register: name must be a str, got {type(name).__name__}")
    reserved = [part for part in _RESERVED if part in name]
    if reserved or not name:
        raise ValueError(
            f"fastvit.integrations.transformers.register: name must be text without {', '.join(map(repr, _RESERVED))}, "
            f"which transformers reads otherwise, got {name!r}"
        )
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.utils.output_capturing import _active_collector  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "fastvit.integrations.transformers.register: needs a transformers that has AttentionInterface, "
            f"AttentionMaskInterface and utils.output_capturing (5.23 has): {error}"
        ) from error
    known = AttentionInterface()
    if name in known and known[name] is not attention_forward:
        raise ValueError(f"fastvit.integrations.transformers.register: name {name!r} is another implementation's")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
