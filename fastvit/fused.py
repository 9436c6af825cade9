"""What the modules of a Vision Transformer compute, as calls of the ops, from the parts that they are made of."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, prepack
from .ops.encoder import TENSORS, run_encoder
from .parts import AttentionParts, BlockParts, LinearParts, MlpParts, Norm, one_or_all, parts_of
from .positions import relative_logits
from .watch import Watch

# where accelerate leaves the names of the ops that a module's fused forward calls
MARK = "_fastvit_ops"
# where quantize leaves, on a block, which of its linear layers are computed in int8
INT8 = "_fastvit_int8"
# where a forward leaves, on the owner of blocks, what it read there
KNOWN = "_fastvit_known"
# where accelerate leaves, on a module whose children's forwards are skipped, the classes of all modules below it
KINDS = "_fastvit_kinds"
BLOCK_OPS = ("encoder", "layer_norm", "linear", "attention", "norm_mlp")
# those of a block whose branches run one after the other
BRANCH_OPS = ("layer_norm", "linear", "attention")
# linear layers of a block: the projection to queries, keys and values, attention's own, fc1, fc2
LINEARS = 4

# queries and keys (B, H, N, E) to what their positions turn them to
Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def active(dropout: nn.Module) -> bool:
    """Whether a dropout or drop-path module changes its input now."""
    return dropout.training and getattr(dropout, "p", getattr(dropout, "drop_prob", 0.0)) > 0.0


def _drop_path_rate(drop_path: Any) -> float | None:
    """The rate an op has to drop branches at in this module's place, or None where the module must be called itself."""
    if not active(drop_path):
        return 0.0
    plain = type(drop_path).__name__ == "DropPath" and getattr(drop_path, "scale_by_keep", True)
    return drop_path.drop_prob if plain and drop_path.drop_prob < 1.0 else None


# module of a forward hook's function -> whether it does nothing now; a library's adapter knows
IDLE_HOOKS: dict[str, Callable[[], bool]] = {}


# the module whose functions accelerate binds
_BINDER = f"{__package__}.drop_in"


def is_bound(module: nn.Module) -> bool:
    """Whether the forward of this instance is one that accelerate bound."""
    forward = module.__dict__.get("forward")
    return type(forward) is partial and forward.func.__module__ == _BINDER


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody else has put a forward on this instance."""
    return "forward" in module.__dict__ and not is_bound(module)


def kinds_below(module: nn.Module) -> list[type]:
    """The classes of all modules below this one, in order."""
    kinds: list[type] = []
    for child in module._modules.values():
        if child is not None:
            kinds.append(type(child))
            kinds += kinds_below(child)
    return kinds


def is_changed(module: nn.Module) -> bool:
    """Whether a module below this one was replaced, added or removed since accelerate looked at them."""
    seen = module.__dict__.get(KINDS)
    return seen is not None and kinds_below(module) != seen


def has_hooks(module: nn.Module) -> bool:
    """Whether a module below this one carries a forward or backward hook, which a fused forward would skip.

    A forward that somebody put on such an instance is one, too. torch.compile sees those that are there when it traces.
    """
    for child in module._modules.values():  # runs in every forward: Module.modules() takes five times as long
        if child is not None and (
            (child._forward_hooks and not idle(child._forward_hooks))
            or child._forward_pre_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
            or ("forward" in child.__dict__ and not is_bound(child))
            or has_hooks(child)
        ):
            return True
    return False


def idle(hooks: dict[int, Any]) -> bool:
    """Whether none of these hooks does anything now."""
    known = [IDLE_HOOKS.get(getattr(hook, "__module__", "")) for hook in hooks.values()]
    return all(idles is not None and idles() for idles in known)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm over the last dimension, torch's own where a model of fp16 or bf16 keeps its norms in fp32."""
    return F.layer_norm(x, x.shape[-1:], *norm) if is_mixed(x, norm) else ops.layer_norm(x, *norm)


def is_mixed(x: Tensor, norm: Norm | None) -> bool:
    """Whether a norm in fp32 meets tokens in fp16 or bf16, which no op of ours takes."""
    weight = None if norm is None else norm[0]
    if weight is None or weight.dtype != torch.float32 or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    return x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)


def projected(parts: AttentionParts, x: Tensor) -> Tensor:
    """Queries, keys and values (B, N, 3·H·E) of tokens (B, N, D)."""
    return ops.linear(x, _whole(one_or_all(parts.qkv_weights)), _whole(one_or_all(parts.qkv_biases)))


def _whole(tensors: Any) -> Any:
    return prepack.joined(tensors) if isinstance(tensors, tuple) else tensors


def attend(
    parts: AttentionParts,
    qkv: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rotate: Rotation | None = None,
) -> Tensor:
    """What an attention module computes between its projections, (B, N, 3·H·E) to (B, N, H·E)."""
    options: dict[str, Any] = {
        "mask": attn_mask,
        "causal": is_causal,
        "scale": parts.scale,
        "dropout": parts.dropout,
    }
    if parts.relative_keys is not None:
        return _attend_relative(parts, qkv, rotate, options)
    if rotate is None and not (is_mixed(qkv, parts.q_norm) or is_mixed(qkv, parts.k_norm)):
        return ops.attention_packed(qkv, parts.num_heads, q_norm=parts.q_norm, k_norm=parts.k_norm, **options)
    q, k, v = heads(parts, qkv, rotate)
    return ops.attention(q, k, v, **options).transpose(1, 2).flatten(2)


def _attend_relative(parts: AttentionParts, qkv: Tensor, rotate: Rotation | None, options: dict[str, Any]) -> Tensor:
    q, k, v = heads(parts, qkv, rotate)
    assert parts.relative_keys is not None
    bias, mask = relative_logits(q, parts.relative_keys, parts.scale), options["mask"]
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask.to(bias.dtype)
    return ops.attention(q, k, v, **{**options, "mask": bias}).transpose(1, 2).flatten(2)


def heads(parts: AttentionParts, qkv: Tensor, rotate: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, E) as the scores take them: normalised, and turned by their positions."""
    q, k, v = qkv.unflatten(-1, (3, parts.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = (t if norm is None else normed(t, norm) for t, norm in ((q, parts.q_norm), (k, parts.k_norm)))
    return (q, k, v) if rotate is None else (*rotate(q, k), v)


def fused_mlp(parts: MlpParts, x: Tensor) -> Tensor:
    """An MLP, (..., D) to (..., D), its children's forwards skipped but for the dropouts'."""
    hidden = parts.hidden_drop(ops.linear(x, *parts.fc1, activation=parts.activation))
    return parts.drop(ops.linear(hidden, *parts.fc2))


def fused_blocks(blocks: Any, x: Tensor) -> Tensor:
    """A sequence of blocks in one op where a backend has one for them all, else block by block."""
    y = encoded(blocks, x)
    if y is None:
        for block in blocks:
            x = block(x)
    return x if y is None else y


def encoded(blocks: Any, x: Tensor) -> Tensor | None:
    """What a sequence of blocks computes, by one op, or None where no backend has one for them all."""
    return _run_encoder(blocks, list(blocks), x)


class _Arguments(NamedTuple):
    """What the encoder takes beside the tokens; several tensors in a tuple stand for one (see ``BlockParts``)."""

    parameters: list[Any]
    eps: list[float]
    num_heads: int
    scale: float
    activation: str
    int8: list[bool]


# names of plain attributes that readers of parts read
_PLAIN = ("num_heads", "num_attention_heads", "scale", "scaling", "eps", "approximate")


class _Known:
    """What the blocks of one owner were when they were read last; copies and pickles of the owner have None instead."""

    def __init__(self, owner: nn.Module, blocks: list[Any], read: _Arguments) -> None:
        self._marks, self._rest = _marks(blocks), read[1:]
        inside = [module for block in blocks for module in block.modules()]
        plain = [(module, name) for module in inside for name in _PLAIN if name in module.__dict__]
        self._watch = Watch(owner, plain + [(module, "forward") for module in inside])
        places = {id(parameter): i for i, parameter in enumerate(self._watch.parameters() or ())}
        places[id(None)] = -1
        self._order: list[Any] = []
        for given in read.parameters:
            found = [places.get(id(t)) for t in (given if isinstance(given, tuple) else (given,))]
            if None in found:  # not a parameter of these blocks
                self._order = [None]
                break
            self._order.append(found if isinstance(given, tuple) else found[0])

    def __reduce__(self) -> tuple:
        return type(None), ()

    def arguments(self, blocks: list[Any]) -> _Arguments | None:
        """The same arguments with today's parameters, or None when the blocks must be read again."""
        found = self._watch.parameters() if None not in self._order and _marks(blocks) == self._marks else None
        if found is None or self._watch.hooked(idle):
            return None
        found.append(None)
        parameters = [found[i] if type(i) is int else tuple(found[j] for j in i) for i in self._order]
        return _Arguments(parameters, *self._rest)


def _marks(blocks: list[Any]) -> list[tuple]:
    return [(block.training, (own := block.__dict__).get(MARK), own.get(INT8)) for block in blocks]


def _run_encoder(owner: nn.Module, blocks: list[Any], x: Tensor) -> Tensor | None:
    """All blocks by one kernel, or None where none serves, or what they compute is more than it does."""
    if x.dim() != 3 or not blocks:
        return None
    compiling = torch.compiler.is_compiling()
    known = None if compiling else owner.__dict__.get(KNOWN)
    arguments = known and known.arguments(blocks)
    if arguments is None:
        arguments = None if has_hooks(owner) else _read(blocks)
        if arguments is None:
            return None
        if not (compiling or any(block.training for block in blocks)):
            owner.__dict__[KNOWN] = _Known(owner, blocks, arguments)
    parameters = arguments.parameters
    for weight in parameters[2::TENSORS]:
        first = weight[0] if type(weight) is tuple else weight
        if first is None or first.shape[1] != x.shape[-1] or first.dtype != x.dtype:
            return None
    return run_encoder(x, [_whole(given) for given in parameters], *arguments[1:])


def _read(blocks: list[Any]) -> _Arguments | None:
    """What blocks compute with, or None where the encoder's kernels cannot run them all at once."""
    parameters: list[Any] = []
    eps: list[float] = []
    int8: list[bool] = []
    shared = None
    for block in blocks:
        parts = parts_of(block) if is_fused_block(block) and not is_changed(block) else None
        if parts is None or not _plain(block, parts):
            return None
        its = parts.attention.num_heads, parts.attention.scale, parts.mlp.activation
        if its != (shared or its):
            return None
        shared = its
        parameters += parts.tensors()
        eps += (parts.norm1[2], parts.norm2[2])
        int8 += block.__dict__.get(INT8, ())
    if shared is None or len(int8) not in (0, LINEARS * len(blocks)):  # quantised blocks beside others
        return None
    return _Arguments(parameters, eps, *shared, int8)


def is_fused_block(module: Any) -> bool:
    """Whether a module is a block that :func:`fused_block` serves."""
    return BLOCK_OPS in (module.__dict__.get(MARK), getattr(type(module), MARK, None))


def encodable(parts: BlockParts) -> bool:
    """Whether the encoder's kernels can run a block at inference, by what it is made of."""
    attention = parts.attention
    (height, width), proj = attention.qkv_weights[0].shape, attention.proj.weight
    square = height * len(attention.qkv_weights) == 3 * width and proj.shape == (width, width)
    plain = attention.q_norm is None and attention.k_norm is None and attention.relative_keys is None
    return square and plain


def _plain(block: Any, parts: BlockParts) -> bool:
    """Whether a block computes no more than the encoder's kernels now."""
    if not encodable(parts):
        return False
    if not block.training:
        return True
    attention, mlp = parts.attention, parts.mlp
    dropouts = (attention.proj_drop, mlp.hidden_drop, mlp.drop, parts.drop_path1, parts.drop_path2)
    return attention.dropout == 0.0 and not any(map(active, dropouts))


def fused_block(
    block: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    rotate: Rotation | None = None,
) -> Tensor:
    """A pre-norm block in a handful of ops, its children's parameters read and their forwards skipped."""
    y = None if is_causal or attn_mask is not None or rotate is not None else _run_encoder(block, [block], x)
    if y is not None:
        return y
    parts = parts_of(block)
    qkv = projected(parts.attention, normed(x, parts.norm1))
    h = attend(parts.attention, qkv, attn_mask, is_causal, rotate)
    attention = parts.attention
    x = add_branch(x, h, attention.proj, attention.proj_drop, parts.layer_scale1, parts.drop_path1)
    return add_mlp(x, parts)


def add_branch(
    x: Tensor, h: Tensor, linear: LinearParts, dropout: nn.Module, gamma: Tensor | None, drop_path: nn.Module
) -> Tensor:
    """x + drop_path(γ · dropout(linear(h))), in one op when the dropout is inactive."""
    if active(dropout):
        y = dropout(ops.linear(h, *linear))
        return x + drop_path(y if gamma is None else y * gamma)
    rate = _drop_path_rate(drop_path)
    if rate is None:
        return x + drop_path(ops.linear(h, *linear, layer_scale=gamma))
    return ops.linear(h, *linear, layer_scale=gamma, residual=x, drop_path=rate)


def add_mlp(x: Tensor, parts: BlockParts) -> Tensor:
    """x + drop_path(γ · mlp(norm(x))), in one op when no dropout is active."""
    mlp, norm, gamma, drop_path = parts.mlp, parts.norm2, parts.layer_scale2, parts.drop_path2
    if active(mlp.hidden_drop) or active(mlp.drop) or is_mixed(x, norm):
        hidden = ops.linear(normed(x, norm), *mlp.fc1, activation=mlp.activation)
        return add_branch(x, mlp.hidden_drop(hidden), mlp.fc2, mlp.drop, gamma, drop_path)
    rate = _drop_path_rate(drop_path)
    y = ops.norm_mlp(
        x,
        *norm[:2],
        *mlp.fc1,
        *mlp.fc2,
        norm[2],
        activation=mlp.activation,
        layer_scale=gamma,
        residual=rate is not None,
        drop_path=rate or 0.0,
    )
    return x + drop_path(y) if rate is None else y
