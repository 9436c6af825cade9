"""Attention: softmax(scale · QKᵀ + mask) V per head, from separate q, k, v or from a packed qkv read in place.

Multi-head self-attention of "An Image is Worth 16x16 Words" (arXiv 2010.11929, appendix A).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _contract as contract
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


def reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the gradients into dq, dk, dv, views of any strides; fp32 inside.

    P = exp(scale QKᵀ + mask - lse), dV = Pᵀ dO, dS = P * (dO Vᵀ - Σ_e dO O), dQ = scale dS K, dK = scale dSᵀ Q.
    """
    k, v = _hide_dead_keys(k, v, mask)
    wide = lse.dtype
    qw, kw, vw = (t.to(wide) for t in (q, k, v))
    grad = dout.transpose(1, 2).to(wide)
    scores = (qw @ kw.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    p = torch.exp(scores - lse[..., None]).masked_fill(lse[..., None] == -math.inf, 0)
    delta = (grad * out.transpose(1, 2).to(wide)).sum(-1, keepdim=True)
    ds = p * (grad @ vw.transpose(-2, -1) - delta) * scale
    dq.copy_(ds @ kw)
    dk.copy_(ds.transpose(-2, -1) @ qw)
    dv.copy_(p.transpose(-2, -1) @ grad)


def _unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, H, N, E) of q, k, v; without k and v, q is packed (B, N, 3, H, E)."""
    if k is None or v is None:
        q, k, v = (t.transpose(1, 2) for t in q.unbind(2))
    return q, k, v


def _forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, mask: Tensor | None, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    launch = backends.implementation("attention", backend).forward
    return launch(*_unpack(q, k, v), mask, causal, scale)


def _fake(q, k, v, mask, causal, scale, backend):
    q = _unpack(q, k, v)[0]
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = contract.backward_launcher("attention", backend, reference_backward)
    grads = _backward_fake(dout, q, k, v, out, lse, mask, causal, scale, backend)
    views = _unpack(*grads) if k is not None else _unpack(grads[0], None, None)
    launch(contract.unit_stride(dout), *_unpack(q, k, v), out, lse, mask, causal, scale, *views)
    return grads


def _backward_fake(dout, q, k, v, out, lse, mask, causal, scale, backend):
    if k is None or v is None:
        return q.new_empty(q.shape), contract.absent(q), contract.absent(q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, mask, causal, scale, backend = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.causal, ctx.scale, ctx.backend = causal, scale, backend
    ctx.save_for_backward(q, k, v, mask, out, lse)


def _autograd(ctx, dout, _lse):
    q, k, v, mask, out, lse = ctx.saved_tensors
    dq, dk, dv = _backward_op(dout, q, k, v, out, lse, mask, ctx.causal, ctx.scale, ctx.backend)
    packed = k is None
    return dq, None if packed else dk, None if packed else dv, None, None, None, None


_op, _backward_op = contract.register(
    "attention", _forward, _fake, _backward, _backward_fake, _setup_context, _autograd
)


def _expand_mask(op: str, mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.float32, q.dtype):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"fastvit.{op}: mask must be a bool, float32 or {q.dtype} Tensor, got {got}")
    if mask.device != q.device:
        raise ValueError(f"fastvit.{op}: mask must be on q's device {q.device}, got {mask.device}")
    shape = (*q.shape[:3], keys)
    if mask.dim() > 4 or any(m not in (1, s) for m, s in zip(reversed(mask.shape), reversed(shape), strict=False)):
        raise ValueError(f"fastvit.{op}: mask must broadcast to {shape}, got {tuple(mask.shape)}")
    return mask.expand(shape)


def _scale(op: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"fastvit.{op}: scale must be a finite number or None, got {scale!r}")
    return float(scale)


def prepare_attention(q, k, v, *, mask=None, causal=False, scale=None, dropout=0.0):
    """Check the public arguments and turn them into the launchers'."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        contract.check_tensor("attention", name, tensor, 4)
    contract.check_rate("attention", "dropout", dropout)
    batch, heads, _, head_dim = q.shape
    keys = k.shape[2]
    contract.check_like("attention", "k", k, "q", q, (batch, heads, keys, head_dim))
    contract.check_like("attention", "v", v, "q", q, (batch, heads, keys, head_dim))
    if head_dim == 0:
        raise ValueError(f"fastvit.attention: the head dimension of q must not be empty, got shape {tuple(q.shape)}")
    mask = _expand_mask("attention", mask, q, keys)
    q, k, v = (contract.unit_stride(t) for t in (q, k, v))
    return q, k, v, mask, bool(causal), _scale("attention", scale, head_dim)


def prepare_attention_packed(qkv, num_heads, *, mask=None, causal=False, scale=None, dropout=0.0):
    """Check the public arguments and turn them into the launchers'; q, k, v are views of qkv."""
    contract.check_tensor("attention_packed", "qkv", qkv, 3)
    contract.check_rate("attention_packed", "dropout", dropout)
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"fastvit.attention_packed: num_heads must be a positive integer, got {num_heads!r}")
    batch, tokens, width = qkv.shape
    if width == 0 or width % (3 * num_heads):
        raise ValueError(
            f"fastvit.attention_packed: qkv must be (B, N, 3·num_heads·E) with num_heads={num_heads}, "
            f"got shape {tuple(qkv.shape)}"
        )
    head_dim = width // (3 * num_heads)
    packed = contract.unit_stride(qkv).view(batch, tokens, 3, num_heads, head_dim)
    q, k, v = _unpack(packed, None, None)
    mask = _expand_mask("attention_packed", mask, q, tokens)
    return q, k, v, mask, bool(causal), _scale("attention_packed", scale, head_dim)


def _run(args, packed: Tensor | None, dropout: float) -> Tensor:
    """(B, N, H, E), through the packed tensor where there is one so that its gradient is written in place."""
    q, k, v, mask, causal, scale = args
    plain = dropout > 0.0 or (mask is not None and contract.needs_grad(mask))
    backend = "reference" if plain else backends.select("attention", *args)
    if backend == "reference":
        return reference(*args, dropout=dropout)
    tensors = (q, k, v) if packed is None else (packed, None, None)
    return _op(*tensors, mask, causal, scale, backend)[0]


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
        dropout: rate on the attention weights; a positive one, like a mask that needs a gradient, runs on the reference
            backend.

    Returns:
        (B, H, N, E), a view of (B, N, H, E) memory.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.
    """
    low = None if not isinstance(q, Tensor) else contract.autocast_dtype(q)
    if low is not None:
        q, k, v, mask = contract.cast(low, q, k, v, mask)
    args = prepare_attention(q, k, v, mask=mask, causal=causal, scale=scale, dropout=dropout)
    return _run(args, None, dropout).transpose(1, 2)


Norm = tuple[Tensor | None, Tensor | None, float]


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
    args = prepare_attention_packed(qkv, num_heads, mask=mask, causal=causal, scale=scale, dropout=dropout)
    q, k = args[:2]
    batch, heads, tokens, head_dim = q.shape
    packed: Tensor | None = contract.unit_stride(qkv).view(batch, tokens, 3, heads, head_dim)
    if q_norm is not None or k_norm is not None:
        q, k = (
            t if norm is None else layer_norm(t.transpose(1, 2), *norm).transpose(1, 2).to(t.dtype)
            for t, norm in ((q, q_norm), (k, k_norm))
        )
        args, packed = (q, k, *args[2:]), None
    return _run(args, packed, dropout).reshape(batch, tokens, heads * head_dim)
