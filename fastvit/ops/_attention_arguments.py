"""What calls of attention say, checked and turned into the launchers' arguments."""

import math

import torch
from torch import Tensor

from . import _contract as contract

Norm = tuple[Tensor | None, Tensor | None, float]

# Without options, which are dropout, seed, weight and bias of q's and of k's norm, their eps, cu_seqlens, max_seqlen.
PLAIN = (0.0, None, None, None, None, None, None, None, None, 0)


def unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, H, N, E) of q, k, v; without k and v, q is packed (B, N, 3, H, E)."""
    if k is None or v is None:
        q, k, v = (t.transpose(1, 2) for t in q.unbind(2))
    return q, k, v


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
    if not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise ValueError(f"fastvit.{op}: scale must be a finite number or None, got {scale!r}")
    return float(scale)


def _norm(op: str, name: str, norm: Norm | None, q: Tensor) -> tuple[Tensor | None, Tensor | None, float | None]:
    """(weight, bias, eps) of the norm of queries or keys, checked; no eps says that there is none."""
    if norm is None:
        return None, None, None
    weight, bias, eps = norm
    like = q
    if contract.autocasting(q):  # torch normalises in fp32 there
        like = q.new_empty(0, dtype=torch.float32)
        weight, bias = (t.float() if isinstance(t, Tensor) else t for t in (weight, bias))
    for part, value in (("weight", weight), ("bias", bias)):
        contract.check_like(op, f"{name}'s {part}", value, "the input", like, (q.shape[-1],))
    if contract.check_eps(op, eps) == 0 and weight is None and bias is None:
        weight = like.new_ones(q.shape[-1])  # a launcher takes 0 and None for an option that is absent
    return contract.unit_stride(weight), contract.unit_stride(bias), float(eps)


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
    return q, k, v, mask, bool(causal), _scale("attention", scale, head_dim), float(dropout), *PLAIN[1:]


def _prepare_qkv(op, qkv, shape, rank, num_heads, q_norm, k_norm, causal, scale, dropout):
    """The launchers' arguments but for mask and sequences; q, k, v are views of qkv."""
    contract.check_tensor(op, "qkv", qkv, rank)
    contract.check_rate(op, "dropout", dropout)
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"fastvit.{op}: num_heads must be a positive integer, got {num_heads!r}")
    if qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"fastvit.{op}: qkv must be {shape} with num_heads={num_heads}, got shape {tuple(qkv.shape)}")
    q, k, v = unpack(packed_heads(qkv, num_heads), None, None)
    norms = (_norm(op, "q_norm", q_norm, q), _norm(op, "k_norm", k_norm, q))
    eps = (norms[0][2], norms[1][2])
    scale = _scale(op, scale, q.shape[-1])
    return q, k, v, None, bool(causal), scale, float(dropout), None, *norms[0][:2], *norms[1][:2], *eps, None, 0


def packed_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, 3, H, E), a view if rows are contiguous; a row of sequences is a batch of one."""
    qkv = contract.unit_stride(qkv if qkv.dim() == 3 else qkv[None])
    return qkv.view(*qkv.shape[:2], 3, num_heads, qkv.shape[2] // (3 * num_heads))


def prepare_attention_packed(
    qkv, num_heads, *, q_norm=None, k_norm=None, mask=None, causal=False, scale=None, dropout=0.0
):
    """Check the public arguments and turn them into the launchers'; q, k, v are views of qkv."""
    options = (q_norm, k_norm, causal, scale, dropout)
    args = _prepare_qkv("attention_packed", qkv, "(B, N, 3·num_heads·E)", 3, num_heads, *options)
    return *args[:3], _expand_mask("attention_packed", mask, args[0], qkv.shape[1]), *args[4:]


def prepare_attention_varlen(
    qkv, cu_seqlens, max_seqlen, num_heads, *, q_norm=None, k_norm=None, causal=False, scale=None, dropout=0.0
):
    """Check the public arguments and turn them into the launchers'; q, k, v are views of qkv."""
    op, options = "attention_varlen", (q_norm, k_norm, causal, scale, dropout)
    args = _prepare_qkv(op, qkv, "(total, 3·num_heads·E)", 2, num_heads, *options)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"fastvit.{op}: cu_seqlens must be an int32 Tensor, got {got}")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"fastvit.{op}: cu_seqlens must be on qkv's device {qkv.device}, got {cu_seqlens.device}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < (2 if qkv.shape[0] else 1):
        raise ValueError(f"fastvit.{op}: cu_seqlens must be (sequences + 1,), got shape {tuple(cu_seqlens.shape)}")
    if not isinstance(max_seqlen, int) or max_seqlen < min(1, qkv.shape[0]):
        raise ValueError(f"fastvit.{op}: max_seqlen must be a positive integer, got {max_seqlen!r}")
    return *args[:14], cu_seqlens.contiguous(), int(max_seqlen)
