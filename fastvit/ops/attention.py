"""Attention: softmax(scale · QKᵀ + mask) V per head, from separate q, k, v or from a packed qkv read in place.

Multi-head self-attention of "An Image is Worth 16x16 Words" (arXiv 2010.11929, appendix A). Options of the op are
dropout, the norm of queries and keys, and sequences of several lengths in one row; what the backend in force lacks is
computed beside the op.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _contract as contract
from ._attention_arguments import (
    PLAIN,
    Norm,
    packed_heads,
    prepare_attention,
    prepare_attention_packed,
    prepare_attention_varlen,
    unpack,
)
from .layer_norm import layer_norm


def _hide_dead_keys(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zero the keys that no query may see, so that what they hold (NaN included) cannot reach the output."""
    if mask is None or mask.dtype != torch.bool:
        return k, v
    dead = ~mask.any(-2)[..., None]
    return k.masked_fill(dead, 0), v.masked_fill(dead, 0)


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, *, dropout: float = 0.0
) -> Tensor:
    """Plain PyTorch on (B, H, N, E) views; returns (B, N, H, E)."""
    k, v = _hide_dead_keys(k, v, mask)
    if causal and mask is not None:
        visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale
    )
    return out.transpose(1, 2)


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    q_eps: float | None,
    k_eps: float | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, q_eps, k_eps)
    launch = backends.implementation("attention", backend).forward
    return launch(*unpack(q, k, v), mask, causal, scale, dropout, seed, *norms, cu_seqlens, max_seqlen)


def _fake(q, k, v, *_):
    q = unpack(q, k, v)[0]
    batch, heads, tokens, head_dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, tokens, heads, head_dim), q.new_empty(batch, heads, tokens, dtype=wide)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    q_eps: float | None,
    k_eps: float | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, q_eps, k_eps)
    launch = backends.implementation("attention", backend).backward
    grads = _empty_gradients(q, k, v)
    views = unpack(*grads) if k is not None else unpack(grads[0], None, None)
    queries, keys, values = unpack(q, k, v)
    if backend == "cpu":  # its kernel multiplies what no query sees by zero
        keys, values = _hide_dead_keys(keys, values, mask)
    dqw, dqb, dkw, dkb = launch(
        *(contract.unit_stride(dout), queries, keys, values, out, lse, *views),
        *(mask, causal, scale, dropout, seed, *norms, cu_seqlens, max_seqlen),
    )
    return *grads, *(contract.absent(q) if g is None else g for g in (dqw, dqb, dkw, dkb))


def _empty_gradients(q, k, v):
    if k is None or v is None:
        return q.new_empty(q.shape), contract.absent(q), contract.absent(q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_fake(dout, q, k, v, out, lse, mask, causal, scale, dropout, seed, qw, qb, kw, kb, *_):
    norms = (contract.absent(q) if p is None else torch.empty_like(p) for p in (qw, qb, kw, kb))
    return *_empty_gradients(q, k, v), *norms


def _setup_context(ctx, inputs, output):
    q, k, v, mask, causal, scale, dropout, seed, qw, qb, kw, kb, q_eps, k_eps, cu_seqlens, max_seqlen, backend = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.scalars = causal, scale, dropout
    ctx.rest = q_eps, k_eps, max_seqlen, backend
    ctx.save_for_backward(q, k, v, out, lse, mask, seed, qw, qb, kw, kb, cu_seqlens)


def _autograd(ctx, dout, _lse):
    q, k, v, out, lse, mask, seed, *norms, cu_seqlens = ctx.saved_tensors
    causal, scale, dropout = ctx.scalars
    q_eps, k_eps, max_seqlen, backend = ctx.rest
    grads = _backward_op(
        *(dout, q, k, v, out, lse, mask, causal, scale, dropout, seed),
        *(*norms, q_eps, k_eps, cu_seqlens, max_seqlen, backend),
    )
    dq, dk, dv, *dnorms = (None if p is None else g for p, g in zip((q, k, v, *norms), grads, strict=True))
    return dq, dk, dv, None, None, None, None, None, *dnorms, None, None, None, None, None


_op, _backward_op = contract.register(
    "attention", _forward, _fake, _backward, _backward_fake, _setup_context, _autograd
)


def _fused(args) -> bool:
    """Whether the launchers' arguments ask for more than plain attention."""
    return args[6] > 0.0 or any(option is not None for option in args[8:15])


def _run(args, packed: Tensor | None) -> Tensor:
    """(B, N, H, E), through the packed tensor where there is one so that its gradient is written in place."""
    q, k, v, mask, causal, scale, dropout, _, *options = args
    if _fused(args) and (_learns(mask) or backends.serving("attention", *args) in (None, "reference")):
        return _run_beside(args)
    backend = "reference" if _learns(mask) else backends.select("attention", *args)
    if backend == "reference":
        return reference(q, k, v, mask, causal, scale)
    seed = torch.randint(2**63 - 1, (1,), device=q.device) if dropout > 0.0 else None
    tensors = (q, k, v) if packed is None else (packed, None, None)
    return _op(*tensors, mask, causal, scale, dropout, seed, *options, backend)[0]


def _learns(mask: Tensor | None) -> bool:
    return mask is not None and contract.needs_grad(mask)


def _run_beside(args) -> Tensor:
    """The same from plain attention: the norms before it, dropout by the reference, and where no kernel in force takes
    several sequences, these padded to the longest."""
    q, k, v, mask, causal, scale, dropout, _, qw, qb, kw, kb, q_eps, k_eps, cu_seqlens, max_seqlen = args
    if q_eps is not None:
        q = layer_norm(q.transpose(1, 2), qw, qb, q_eps).transpose(1, 2).to(v.dtype)
    if k_eps is not None:
        k = layer_norm(k.transpose(1, 2), kw, kb, k_eps).transpose(1, 2).to(v.dtype)
    if cu_seqlens is not None:
        alone = (q, k, v, None, causal, scale, dropout, *PLAIN[1:-2], cu_seqlens, max_seqlen)
        if backends.serving("attention", *alone) not in (None, "reference"):
            return _run(alone, None)
        return _run_padded(q, k, v, causal, scale, dropout, cu_seqlens, max_seqlen)
    if dropout > 0.0:
        return reference(q, k, v, mask, causal, scale, dropout=dropout)
    return _run((q, k, v, mask, causal, scale, *PLAIN), None)


def _run_padded(q, k, v, causal, scale, dropout, cu_seqlens, max_seqlen) -> Tensor:
    """Sequences as a batch with a mask. The lengths are never read on the host, so this traces and does not wait."""
    heads, total = q.shape[1:3]
    if total == 0:
        return v.transpose(1, 2).contiguous()
    longest = min(max_seqlen, total)
    token = torch.arange(total, device=q.device)
    sequence = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
    index = cu_seqlens[:-1, None] + token[:longest]
    inside = index < cu_seqlens[1:, None]
    # Rows of no sequence hold what another one left there: zeros, so that its NaN stays its own.
    q, k, v = (
        torch.where(inside[:, None, :, None], t[0][:, index.clamp(max=total - 1)].transpose(0, 1), 0) for t in (q, k, v)
    )
    mask = inside[:, None, None, :].expand(-1, heads, longest, -1)
    out = _run_beside((q, k, v, mask, causal, scale, dropout, *PLAIN[1:]))
    return out[sequence, token - cu_seqlens[sequence]][None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · QKᵀ + mask) V, as torch's scaled_dot_product_attention.

    Args:
        q: (B, H, N, E); k, v: (B, H, S, E). Any strides; fp64 / fp32 / fp16 / bf16.
        mask: broadcastable to (B, H, N, S): boolean (True = attend) or additive (q's dtype or fp32). A query that may
            see no key gives exactly 0. Combines with ``causal``.
        causal: token n sees keys 0..n only.
        scale: defaults to 1/√E.
        dropout: rate on the attention weights, reproducible from torch's seed. A backend whose kernel has none, and any
            backend for a mask that needs a gradient, leaves the call to the reference.

    Returns:
        (B, H, N, E), a view of (B, N, H, E) memory.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.
    """
    low = None if not isinstance(q, Tensor) else contract.autocast_dtype(q)
    if low is not None:
        q, k, v, mask = contract.cast(low, q, k, v, mask)
    args = prepare_attention(q, k, v, mask=mask, causal=causal, scale=scale, dropout=dropout)
    return _run(args, None).transpose(1, 2)


def attention_packed(
    qkv: Tensor,
    num_heads: int,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Self-attention on the packed output of a qkv projection, without a copy of q, k or v.

    Args:
        qkv: (B, N, 3·D) in timm's order: D = H·E columns of q, then k, then v, heads outermost in each.
        num_heads: H.
        q_norm, k_norm: (weight, bias, eps) of a LayerNorm over each head's E entries (arXiv 2302.05442), or None.
        mask, causal, scale, dropout: as in :func:`attention`.

    Returns:
        (B, N, D), contiguous, heads outermost: what the output projection reads.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.
    """
    low = None if not isinstance(qkv, Tensor) else contract.autocast_dtype(qkv)
    if low is not None:
        qkv, mask = contract.cast(low, qkv, mask)
    args = prepare_attention_packed(
        qkv, num_heads, q_norm=q_norm, k_norm=k_norm, mask=mask, causal=causal, scale=scale, dropout=dropout
    )
    return _run(args, packed_heads(qkv, num_heads)).flatten(2)


def attention_varlen(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Self-attention within each of several images of different sizes, packed in one row without padding.

    Args:
        qkv: (total, 3·D), the tokens of all images one after the other, columns as in :func:`attention_packed`.
        cu_seqlens: (images + 1,), int32: image i is rows cu_seqlens[i] to cu_seqlens[i + 1]. Starts with 0, ends with
            total, never falls; equal neighbours are an image without tokens. On a CPU the kernel checks that; elsewhere
            the host does not read the values.
        max_seqlen: tokens of the longest image, or more.
        num_heads, q_norm, k_norm, causal, scale, dropout: as in :func:`attention_packed`.

    Returns:
        (total, D), contiguous.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.
    """
    low = None if not isinstance(qkv, Tensor) else contract.autocast_dtype(qkv)
    if low is not None:
        (qkv,) = contract.cast(low, qkv)
    options = {"causal": causal, "scale": scale, "dropout": dropout}
    args = prepare_attention_varlen(qkv, cu_seqlens, max_seqlen, num_heads, q_norm=q_norm, k_norm=k_norm, **options)
    return _run(args, packed_heads(qkv, num_heads))[0].flatten(1)
