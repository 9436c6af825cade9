"""The work of a recorded call: bytes from its own tensors, FLOPs by the formulas of `work` and of torch's counter.

Bytes are each tensor that goes in or comes out, once: what no implementation of the op can do without. FLOPs are two
for each multiply-add of a product and none for the rest, as everywhere here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import work
from .recording import OURS, Call, Operand, operands

# these replace what their argument holds, and read nothing of it
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_")


def bytes_of(call: Call) -> int:
    """Bytes that the call must move; 0 for one that neither returns a tensor nor writes to one.

    An argument that is changed is read and written, one that is only replaced is written. Two views of the same numbers
    are one tensor.
    """
    if not operands(call.results) and not call.written:
        return 0
    overwrites = call.name.rpartition("::")[2] in _OVERWRITING
    replaced = {operand.place for its, operand in call.written if overwrites or its.is_out}
    read = {operand.place: operand.bytes for operand in operands(call.arguments) if operand.place not in replaced}
    written = {operand.place: operand.bytes for operand in operands(call.results)}
    written |= {operand.place: operand.bytes for _, operand in call.written}
    return sum(read.values()) + sum(written.values())


def flops_of(call: Call) -> int | None:
    """Floating-point operations of the call; None where its tensors do not tell."""
    namespace, _, name = call.name.partition("::")
    if f"{namespace}::" in OURS:
        formula = _FORMULAS.get(name)
        return formula(call.named) if formula is not None else 0
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):  # torch's counter has those of a GPU alone
        q, k = call.named["query"], call.named["key"]
        count: Callable[..., work.Work] = work.attention_backward if name.endswith("backward") else work.attention
        return count(*q.shape[:3], k.shape[2], q.shape[3]).flops
    return _counted(call)


def _counted(call: Call) -> int:
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(call.op.overloadpacket)
    if formula is None:
        return 0
    given = list(zip(call.op._schema.arguments, map(_as_meta, call.arguments), strict=True))
    plain = [value for argument, value in given if not argument.kwarg_only]
    options = {argument.name: value for argument, value in given if argument.kwarg_only}
    results = tuple(map(_as_meta, call.results))
    return int(formula(*plain, **options, out_val=results[0] if len(results) == 1 else results))


def _as_meta(given: Any) -> Any:
    """A tensor without memory in the place of each `Operand`."""
    if isinstance(given, list):
        return [_as_meta(one) for one in given]
    return torch.empty(given.shape, device="meta") if isinstance(given, Operand) else given


Arguments = Mapping[str, Any]


def _attention(count: Callable[..., work.Work], a: Arguments) -> int:
    q, k = a["q"], a["k"]
    if k is None:  # packed, (B, N, 3, H, E)
        B, N, _, H, E = q.shape
        return count(B, H, N, N, E).flops
    return count(*q.shape[:3], k.shape[2], q.shape[3]).flops


def _linear(count: Callable[..., work.Work], a: Arguments) -> int:
    return count(*a["x"].shape, a["weight"].shape[0]).flops


def _norm_mlp(count: Callable[..., work.Work], a: Arguments) -> int:
    M, D = a["x"].shape
    F, out = a["fc1_weight"].shape[0], a["fc2_weight"].shape[0]
    return count(M, D, F).flops * (D + out) // (2 * D)  # without a residual the result may be of another width


def _patch_embed(count: Callable[..., work.Work], a: Arguments) -> int:
    B, _, height, width = a["image"].shape
    D, C, P, Q = a["weight"].shape
    grid = height // P * (width // Q)
    return count(B, grid, C * P * Q, D, 0).flops


def _block(count: Callable[..., work.Work], a: Arguments) -> int:
    B, N, D = a["x"].shape
    H = a["num_heads"]
    return count(B, H, N, D // H, a["fc1_weight"].shape[0]).flops


def _encoder(a: Arguments) -> int | None:
    """Packed weights have no shape; fc1's bias has fc1's width."""
    from fastvit.ops.encoder import TENSORS, EncoderBlock

    parameters, heads = a["parameters"], a.get("heads", a.get("num_heads"))
    total = 0
    for first in range(0, len(parameters), TENSORS):
        block = dict(zip(EncoderBlock._fields, parameters[first : first + TENSORS], strict=False))
        weight, bias = block["fc1_weight"], block["fc1_bias"]
        hidden = weight if len(weight.shape) == 2 else bias
        if hidden is None or not hidden.count:
            return None
        total += _block(work.block, {"x": a["x"], "num_heads": heads, "fc1_weight": hidden})
    return total


_FORMULAS: dict[str, Callable[[Arguments], int | None]] = {
    "attention": functools.partial(_attention, work.attention),
    "attention_backward": functools.partial(_attention, work.attention_backward),
    "linear": functools.partial(_linear, work.linear),
    "linear_backward": functools.partial(_linear, work.linear_backward),
    "norm_mlp": functools.partial(_norm_mlp, work.norm_mlp),
    "norm_mlp_backward": functools.partial(_norm_mlp, work.norm_mlp_backward),
    "patch_embed": functools.partial(_patch_embed, work.patch_embed),
    "patch_embed_backward": functools.partial(_patch_embed, work.patch_embed_backward),
    "encoder": _encoder,
    "block": functools.partial(_block, work.block),
    "block_backward": functools.partial(_block, work.block_backward),
}
