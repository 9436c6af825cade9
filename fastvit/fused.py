"""What a module of a Vision Transformer computes, as calls of the ops: forwards that read their module's attributes.

They read nothing but attributes that timm's modules have as well, so that the integrations can bind them to those.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .ops.encoder import TENSORS, run_encoder
from .watch import Watch

# where accelerate leaves the names of the ops that a module's fused forward calls
MARK = "_fastvit_ops"
# where quantize leaves, on a block, which of its linear layers are computed in int8
INT8 = "_fastvit_int8"
# where a forward leaves, on the owner of blocks, what it read there
KNOWN = "_fastvit_known"
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BLOCK_OPS = ("encoder", "layer_norm", "linear", "attention", "norm_mlp")


def activation_name(module: nn.Module) -> str | None:
    """The ops' name of an activation module (torch's, timm's or ours), or None when the ops have no such activation."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(module).__name__)


def activation_of(mlp: Any) -> str:
    """The ops' name of an MLP's activation; TypeError when they have none."""
    name = activation_name(mlp.act)
    if name is None:  # one that was put there after accelerate had looked
        raise TypeError(f"fastvit: activation {type(mlp.act).__name__} has no fused form; expected a GELU")
    return name


def active(dropout: nn.Module) -> bool:
    """Whether a dropout or drop-path module changes its input now."""
    return dropout.training and getattr(dropout, "p", getattr(dropout, "drop_prob", 0.0)) > 0.0


def _drop_path_rate(drop_path: Any) -> float | None:
    """The rate an op has to drop branches at in this module's place, or None where the module must be called itself."""
    if not active(drop_path):
        return 0.0
    plain = type(drop_path).__name__ == "DropPath" and getattr(drop_path, "scale_by_keep", True)
    return drop_path.drop_prob if plain and drop_path.drop_prob < 1.0 else None


def _norm_args(norm: Any) -> tuple[Tensor | None, Tensor | None, float] | None:
    return None if isinstance(norm, nn.Identity) else (norm.weight, norm.bias, norm.eps)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module below this one carries a forward or backward hook, which a fused forward would skip.

    Always False while torch.compile traces, which does not follow hooks added later either.
    """
    return not torch.compiler.is_compiling() and _child_has_hooks(module)


def _child_has_hooks(module: nn.Module) -> bool:
    for child in module._modules.values():  # runs in every forward: Module.modules() takes five times as long
        if child is not None and (
            child._forward_hooks
            or child._forward_pre_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
            or _child_has_hooks(child)
        ):
            return True
    return False


def attend(attn: Any, qkv: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """What an attention module computes between its projections, (B, N, 3·D) to (B, N, D)."""
    return ops.attention_packed(
        qkv,
        attn.num_heads,
        q_norm=_norm_args(attn.q_norm),
        k_norm=_norm_args(attn.k_norm),
        mask=attn_mask,
        causal=is_causal,
        scale=attn.scale,
        dropout=attn.attn_drop.p if attn.training else 0.0,
    )


def fused_blocks(blocks: Any, x: Tensor) -> Tensor:
    """A sequence of blocks (ours or timm's) in one op where a backend has one for them all, else block by block."""
    y = _run_encoder(blocks, list(blocks), x)
    if y is None:
        for block in blocks:
            x = block(x)
    return x if y is None else y


class _Arguments(NamedTuple):
    """What the encoder takes beside the tokens."""

    parameters: list[Tensor | None]
    eps: list[float]
    num_heads: int
    scale: float
    activation: str
    int8: list[bool]


class _Known:
    """What the blocks of one owner were when they were read last; copies and pickles of the owner have None instead."""

    def __init__(self, owner: nn.Module, blocks: list[Any], read: _Arguments) -> None:
        self._marks, self._rest = _marks(blocks), read[1:]
        attributes = [(block.attn, name) for block in blocks for name in ("num_heads", "scale")]
        attributes += [(norm, "eps") for block in blocks for norm in (block.norm1, block.norm2)]
        attributes += [(block.mlp.act, "approximate") for block in blocks]
        self._watch = Watch(owner, attributes)
        places = {id(parameter): i for i, parameter in enumerate(self._watch.parameters() or ())}
        places[id(None)] = -1
        self._order = [places.get(id(parameter)) for parameter in read.parameters]

    def __reduce__(self) -> tuple:
        return type(None), ()

    def arguments(self, blocks: list[Any]) -> _Arguments | None:
        """The same arguments with today's parameters, or None when the blocks must be read again."""
        found = self._watch.parameters() if None not in self._order and _marks(blocks) == self._marks else None
        if found is None or self._watch.hooked():
            return None
        found.append(None)
        return _Arguments([found[i] for i in self._order], *self._rest)  # type: ignore[index]


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
    for weight in arguments.parameters[2::TENSORS]:
        if weight is None or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
            return None
    return run_encoder(x, *arguments)


def _read(blocks: list[Any]) -> _Arguments | None:
    """What blocks compute with, or None where the encoder's kernels cannot run them all at once."""
    if not _plain(blocks[0]):
        return None
    first = blocks[0].attn
    heads, scale, activation = first.num_heads, first.scale, activation_of(blocks[0].mlp)
    parameters: list[Tensor | None] = []
    eps: list[float] = []
    int8: list[bool] = []
    for block in blocks:
        if not _plain(block):
            return None
        attn, mlp, norm1, norm2 = block.attn, block.mlp, block.norm1, block.norm2
        qkv, proj, fc1, fc2 = linears(block)
        if (attn.num_heads, attn.scale, activation_of(mlp)) != (heads, scale, activation):
            return None
        gamma1, gamma2 = _gamma(block.ls1), _gamma(block.ls2)
        parameters += (norm1.weight, norm1.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, gamma1)
        parameters += (norm2.weight, norm2.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, gamma2)
        eps += (norm1.eps, norm2.eps)
        int8 += block.__dict__.get(INT8, ())
    if len(int8) not in (0, 4 * len(blocks)):  # blocks that are quantised beside blocks that are not
        return None
    return _Arguments(parameters, eps, heads, scale, activation, int8)


def is_fused_block(module: Any) -> bool:
    """Whether a module is a block that :func:`fused_block` serves."""
    return BLOCK_OPS in (module.__dict__.get(MARK), type(module).__dict__.get(MARK))


def linears(block: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """A block's linear layers, those of LINEARS."""
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def encodable(block: Any) -> bool:
    """Whether a block is one that the encoder's kernels can run at inference, by what it is made of."""
    if not is_fused_block(block):
        return False
    attn, (height, width) = block.attn, block.attn.qkv.weight.shape
    plain = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    return plain and height == 3 * width and attn.proj.weight.shape == (width, width)


def _plain(block: Any) -> bool:
    """Whether a block computes no more than the encoder's kernels now."""
    if not encodable(block):
        return False
    if not block.training:
        return True
    attn, mlp = block.attn, block.mlp
    dropouts = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2, block.drop_path1, block.drop_path2)
    return not any(map(active, dropouts))


def fused_block(block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """A block (ours or timm's) in a handful of ops, its children's parameters read and their forwards skipped."""
    y = None if is_causal or attn_mask is not None else _run_encoder(block, [block], x)
    if y is not None:
        return y
    attn = block.attn
    normalised = ops.layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    heads = attend(attn, ops.linear(normalised, attn.qkv.weight, attn.qkv.bias), attn_mask, is_causal)
    x = _add_branch(x, heads, attn.proj, attn.proj_drop, block.ls1, block.drop_path1)
    return _add_mlp(x, block.norm2, block.mlp, block.ls2, block.drop_path2)


def _gamma(layer_scale: Any) -> Tensor | None:
    return None if isinstance(layer_scale, nn.Identity) else layer_scale.gamma


def _add_branch(
    x: Tensor, h: Tensor, linear: nn.Linear, dropout: nn.Module, layer_scale: nn.Module, drop_path: nn.Module
) -> Tensor:
    """x + drop_path(layer_scale(dropout(linear(h)))), in one op when the dropout is inactive."""
    if active(dropout):
        return x + drop_path(layer_scale(dropout(ops.linear(h, linear.weight, linear.bias))))
    rate, gamma = _drop_path_rate(drop_path), _gamma(layer_scale)
    if rate is None:
        return x + drop_path(ops.linear(h, linear.weight, linear.bias, layer_scale=gamma))
    return ops.linear(h, linear.weight, linear.bias, layer_scale=gamma, residual=x, drop_path=rate)


def _add_mlp(x: Tensor, norm: nn.LayerNorm, mlp: Any, layer_scale: nn.Module, drop_path: nn.Module) -> Tensor:
    """x + drop_path(layer_scale(mlp(norm(x)))), in one op when no dropout is active."""
    activation = activation_of(mlp)
    if active(mlp.drop1) or active(mlp.drop2):
        normalised = ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        hidden = ops.linear(normalised, mlp.fc1.weight, mlp.fc1.bias, activation=activation)
        return _add_branch(x, mlp.drop1(hidden), mlp.fc2, mlp.drop2, layer_scale, drop_path)
    rate = _drop_path_rate(drop_path)
    y = ops.norm_mlp(
        x,
        norm.weight,
        norm.bias,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
        norm.eps,
        activation=activation,
        layer_scale=_gamma(layer_scale),
        residual=rate is not None,
        drop_path=rate or 0.0,
    )
    return x + drop_path(y) if rate is None else y
