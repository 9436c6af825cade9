"""PyTorch's scaled_dot_product_attention on CUDA served by our kernels, by PyTorch's own registry.

The registry of flash attention implementations (``torch/nn/attention/_registry.py``) takes a function that overrides
ATen's flash operators for CUDA tensors and hands back what undoes it. What :func:`register` offers under "fastvit"
overrides the two that scaled_dot_product_attention calls; those for ragged batches stay PyTorch's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.library import Library

from .. import backends, ops
from ..settings import SETTINGS

NAME = "fastvit"
_FORWARD = "_scaled_dot_product_flash_attention"


def _refuse(reason: str) -> backends.BackendError:
    return backends.BackendError(
        f"fastvit as flash attention: {reason}; torch.nn.attention.restore_flash_attention_impl() gives PyTorch's back"
    )


def _check(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.shape != value.shape or key.dim() != 4:
        raise _refuse(f"query must be (B, H, N, E), key and value alike (B, heads, S, E), got {shapes}")
    batch, heads, tokens, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or not key.shape[1] or heads % key.shape[1]:
        raise _refuse(f"key must have query's batch and head dim, and heads that divide query's, got {shapes}")
    if causal and key.shape[2] != tokens:
        raise _refuse(f"causal attention needs as many keys as queries, got {shapes}")


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The same values in the memory layout that PyTorch promises: torch.empty_like's."""
    target = torch.empty_like(like)
    return tensor if tensor.stride() == target.stride() else target.copy_(tensor)


@dataclass(frozen=True)
class Provider:
    """ATen's two flash operators, computed by the first of these backends that can.

    forward returns (B, H, N, E), the rows' logsumexp (B, H, N) in fp32 and natural logarithms, and the dropout's seed
    in the place of the generator's state. Which backend it was is not remembered: backward is asked for the same
    tensors and decides alike, on whatever thread it runs.
    """

    candidates: tuple[str, ...]

    def _prepare(self, query, key, value, causal, scale, dropout, seed) -> tuple[Any, tuple[Any, ...]]:
        """The launchers and their arguments, heads of grouped queries repeated."""
        _check(query, key, value, causal)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        reasons = {}
        for q, k, v in ((query, key, value), tuple(t.contiguous() for t in (query, key, value))):
            args = ops.prepare_attention(*map(_rows, (q, k, v)), causal=causal, scale=scale, dropout=dropout)
            args = (*args[:7], seed if dropout else None, *args[8:])
            for name in self.candidates:
                reasons[name] = backends.why_not("attention", args, name)
                if reasons[name] is None:
                    return backends.implementation("attention", name), args
        raise _refuse("; ".join(str(reason) for reason in reasons.values()))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        """aten::_scaled_dot_product_flash_attention."""
        if return_debug_mask:
            raise _refuse("return_debug_mask must be False")
        # Two numbers, as PyTorch's has, of which the first is used; none is drawn without dropout.
        seed = torch.zeros(2, dtype=torch.int64, device=query.device)
        if dropout_p > 0.0:
            seed.random_(2**63 - 1)
        kernels, args = self._prepare(query, key, value, is_causal, scale, dropout_p, seed[:1])
        out, lse = kernels.forward(*args)
        offset = torch.zeros((), dtype=torch.uint64, device=query.device)
        out = _laid_out_like(out.transpose(1, 2), query)
        lengths = query.shape[2], key.shape[2]
        return out, lse, None, None, *lengths, seed.view(torch.uint64), offset, query.new_empty(0)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """aten::_scaled_dot_product_flash_attention_backward."""
        seed = philox_seed.view(torch.int64)[:1] if dropout_p > 0.0 else None
        kernels, args = self._prepare(query, key, value, is_causal, scale, dropout_p, seed)
        q, k, v, *options = args
        out, grad_out = (t.transpose(1, 2) for t in (out, grad_out))
        grads = [t.new_empty(t.shape) for t in (q, k, v)]
        kernels.backward(_rows(grad_out), q, k, v, out.contiguous(), logsumexp, *grads, *options)
        if key.shape[1] != query.shape[1]:
            grads[1:] = (g.unflatten(1, (key.shape[1], -1)).sum(2) for g in grads[1:])
        dq, dk, dv = (_laid_out_like(g, t) for g, t in zip(grads, (query, key, value), strict=True))
        return dq, dk, dv


class Handle:
    """Keeps the overrides alive until :meth:`remove`."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        self._library = None


def _override(provider: Provider, dispatch_key: str) -> Handle:
    library = Library("aten", "IMPL", dispatch_key)
    library.impl(_FORWARD, provider.forward, dispatch_key)
    library.impl(f"{_FORWARD}_backward", provider.backward, dispatch_key)
    return Handle(library)


def _activate() -> Handle | None:
    """What ``activate_flash_attention_impl("fastvit")`` runs."""
    if SETTINGS.disable:
        return None
    if not torch.cuda.is_available():
        raise RuntimeError("fastvit as flash attention: needs a CUDA device, and torch.cuda.is_available() says False")
    # Backends are demanded per thread, and backward has its own: what counts is what is in force now.
    demanded = backends.requested()
    usable = ("triton", "cuda")
    wanted = usable if demanded == "auto" else (demanded,)
    reasons = [f"backend {name!r} computes on no GPU" for name in wanted if name not in usable]
    reasons += [reason for reason in map(backends.why_unavailable, wanted) if reason]
    candidates = tuple(name for name in wanted if name in usable and backends.why_unavailable(name) is None)
    if not candidates:
        raise _refuse("; ".join(reasons))
    return _override(Provider(candidates), "CUDA")


def register() -> None:
    """Offer our kernels to PyTorch as the flash attention named "fastvit"; nothing changes until it is activated.

    ::

        fastvit.integrations.pytorch.register()
        torch.nn.attention.activate_flash_attention_impl("fastvit")    # scaled_dot_product_attention, on CUDA
        torch.nn.attention.restore_flash_attention_impl()              # PyTorch's again

    From then on scaled_dot_product_attention runs here whenever PyTorch chooses flash attention for CUDA tensors: fp16
    or bf16, no mask. Dropout, grouped-query heads and causal attention are included. What no kernel here takes raises
    :class:`fastvit.BackendError` with the reason; it does not fall back. ``with fastvit.backend("cuda"):`` around the
    activation chooses among "triton" and "cuda" for as long as it lasts. With ``FASTVIT_DISABLE`` activating changes
    nothing. A forward with dropout must be followed by its backward before the implementation is changed.

    Raises:
        RuntimeError: this PyTorch has no such registry. Activating raises it where there is no CUDA device, and
            :class:`fastvit.BackendError` where neither backend can be used.
    """
    offer = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if offer is None:
        raise RuntimeError(
            "fastvit.integrations.pytorch.register: needs a PyTorch with "
            f"torch.nn.attention.register_flash_attention_impl, found {torch.__version__}"
        )
    offer(NAME, register_fn=_activate)
