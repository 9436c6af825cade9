"""The operators: differentiable functions on tensors, each with a reference and the backends that serve it."""

from typing import Any

from .. import backends as _backends
from ._attention_arguments import prepare_attention, prepare_attention_packed, prepare_attention_varlen
from .attention import attention, attention_packed, attention_varlen
from .encoder import EncoderBlock, encoder, prepare_encoder
from .group_norm import group_norm, prepare_group_norm
from .layer_norm import add_layer_norm, layer_norm, prepare_add_layer_norm, prepare_layer_norm
from .linear import linear, prepare_linear
from .norm_mlp import norm_mlp, prepare_norm_mlp
from .patch_embed import patch_embed, prepare_patch_embed

__all__ = [
    "EncoderBlock",
    "add_layer_norm",
    "attention",
    "attention_packed",
    "attention_varlen",
    "encoder",
    "group_norm",
    "layer_norm",
    "linear",
    "norm_mlp",
    "patch_embed",
    "why_not",
]

# public function -> (op of the registry, its argument check)
_PUBLIC = {
    "add_layer_norm": ("layer_norm", prepare_add_layer_norm),
    "attention": ("attention", prepare_attention),
    "attention_packed": ("attention", prepare_attention_packed),
    "attention_varlen": ("attention", prepare_attention_varlen),
    "encoder": ("encoder", prepare_encoder),
    "group_norm": ("group_norm", prepare_group_norm),
    "layer_norm": ("layer_norm", prepare_layer_norm),
    "linear": ("linear", prepare_linear),
    "norm_mlp": ("norm_mlp", prepare_norm_mlp),
    "patch_embed": ("patch_embed", prepare_patch_embed),
}


def why_not(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
    """Why a backend cannot run an op on these inputs.

    Args:
        op: a public function of ``fastvit.ops``, e.g. "attention_packed".
        args, kwargs: that function's arguments.
        backend: one of "reference", "triton", "cuda", "cpu"; None asks for all of them.

    Returns:
        The reason in one sentence, or None when the backend can run it; for ``backend=None`` a dict of these.

    Raises:
        ValueError: an unknown op or backend; TypeError, ValueError: arguments the op itself would refuse.
    """
    if op not in _PUBLIC:
        raise _backends.unknown_name("op", op, tuple(_PUBLIC))
    name, prepare = _PUBLIC[op]
    launcher_args = prepare(*args, **kwargs)  # type: ignore[operator]
    if backend is not None:
        if backend not in _backends.BACKENDS:
            raise _backends.unknown_name("backend", backend, _backends.BACKENDS)
        return _backends.why_not(name, launcher_args, backend)
    return {candidate: _backends.why_not(name, launcher_args, candidate) for candidate in _backends.BACKENDS}
