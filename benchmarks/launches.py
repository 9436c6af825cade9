"""Calls of the Triton launchers as data: what the ahead-of-time check compiles and the static report is about.

For each kernel the barest and the fullest call, and each path through it. The tensors carry no storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import work
from .work import Work


@dataclass(frozen=True)
class Launch:
    """One launcher call: op and entry ("forward", "backward") name it, arguments(dtype) builds it.

    flops and bytes(itemsize) are the least work the call holds: two operations per multiply-add of its matrix products,
    each input read once and each output written once, as work.py has the formulas (flops=w.flops, bytes=w.bytes); None
    where the case is there for its code path alone.
    """

    op: str
    entry: str
    label: str
    arguments: Callable[[torch.dtype], tuple]
    flops: int | None = None
    bytes: Callable[[int], int] | None = None


def launches() -> Iterator[Launch]:
    """Every case, op by op."""
    yield from _layer_norm()
    yield from _linear()
    yield from _norm_mlp()
    yield from _attention()
    yield from _patch_embed()


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer_norm() -> Iterator[Launch]:
    def row_tensors(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return _empty(rows, width, dtype=dtype), _empty(width, dtype=dtype), _empty(8, dtype=dtype)

    def forward(rows: int, width: int, full: bool) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, row, samples = row_tensors(rows, width, dtype)
            return (x, x, row, row, row, 1e-6, samples) if full else (x, None, None, row, row, 1e-6, None)

        return arguments

    def backward(rows: int, width: int, full: bool) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, row, samples = row_tensors(rows, width, dtype)
            statistics = _empty(rows, dtype=torch.float32)
            options = (x, row, samples) if full else (None, None, None)
            return x, x if full else None, x, statistics, statistics, row, *options

        return arguments

    for width in (192, 384, 768, 1023, 1024, 1280, 1408, 1664, 4096, 65537):
        for full in (False, True):
            rows = 256 * 197 if width < 4096 else 1000
            label = f"{'residual' if full else 'plain'} {width}"
            yield Launch("layer_norm", "forward", label, forward(rows, width, full))
            yield Launch("layer_norm", "backward", label, backward(rows, width, full))


def _linear() -> Iterator[Launch]:
    def forward(rows: int, depth: int, width: int, full: bool, activation: str) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, weight = _empty(rows, depth, dtype=dtype), _empty(width, depth, dtype=dtype)
            row = _empty(width, dtype=dtype)
            if not full:
                return x, weight, None, None, None, activation, False, None
            residual = _empty(rows, width, dtype=dtype)
            return x, weight, row, row, residual, activation, True, _empty(8, dtype=dtype)

        return arguments

    def backward(rows: int, depth: int, width: int, full: bool, activation: str) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, weight = _empty(rows, depth, dtype=dtype), _empty(width, depth, dtype=dtype)
            row = _empty(width, dtype=dtype)
            dy = _empty(rows, width, dtype=dtype)
            preact = dy if activation != "none" else _empty(0, dtype=dtype)
            row, samples = (row, _empty(8, dtype=dtype)) if full else (None, None)
            return dy, x, weight, row, row, preact, activation, samples

        return arguments

    yield Launch("linear", "forward", "bare", forward(1000, 768, 768, False, "none"))
    yield Launch("linear", "forward", "full gelu_tanh odd", forward(1000, 59, 768, True, "gelu_tanh"))
    yield Launch("linear", "forward", "full gelu few rows", forward(8, 768, 768, True, "gelu"))


def _norm_mlp() -> Iterator[Launch]:
    def forward(width: int, full: bool) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, row, hidden = _empty(1000, width, dtype=dtype), _empty(width, dtype=dtype), _empty(3072, dtype=dtype)
            up, down = _empty(3072, width, dtype=dtype), _empty(width, 3072, dtype=dtype)
            if not full:
                return x, None, None, up, None, down, None, None, 1e-6, "quick_gelu", False, False, None
            return x, row, row, up, hidden, down, row, row, 1e-6, "gelu", True, True, None

        return arguments

    yield Launch("norm_mlp", "forward", "bare 65537", forward(65537, False))
    yield Launch("norm_mlp", "forward", "full 768", forward(768, True))


def _attention() -> Iterator[Launch]:
    def forward(keys: int, head_dim: int, mask: str, causal: bool) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            q, k, v = _empty(2, keys, 3, 12, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
            mask_dtype = torch.bool if mask == "bool" else dtype
            table = None if mask == "none" else _empty(2, 1, 1, keys, dtype=mask_dtype).expand(2, 12, keys, keys)
            return q, k, v, table, causal, 0.125

        return arguments

    for keys, head_dim, mask, causal in (
        (197, 64, "none", False),
        (197, 64, "bool", False),
        (50, 64, "additive", False),
        (577, 64, "none", False),
        (577, 59, "bool", False),
        (577, 80, "additive", True),
        (128, 80, "none", False),
        (257, 256, "bool", False),
    ):
        label = f"{keys} x {head_dim}" + f" {mask}" * (mask != "none") + " causal" * causal
        yield Launch("attention", "forward", label, forward(keys, head_dim, mask, causal))


def _patch_embed() -> Iterator[Launch]:
    def tensors(batch: int, patch: int, pixels: str, dtype: torch.dtype) -> tuple:
        image = _empty(batch, 3, 224, 224, dtype=dtype)
        if pixels == "uint8":
            image = _empty(batch, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        elif pixels == "channels last":
            image = _empty(batch, 224, 224, 3, dtype=dtype).permute(0, 3, 1, 2)
        weight, scale = _empty(768, 3, patch, patch, dtype=dtype), [0.017, 0.0175, 0.0174]
        return image, weight, scale if pixels in ("uint8", "scaled") else None, (224 // patch) ** 2 + 1

    def forward(batch: int, patch: int, pixels: str, full: bool) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            image, weight, scale, tokens = tensors(batch, patch, pixels, dtype)
            row, table, prefix = (_empty(*shape, dtype=dtype) for shape in ((768,), (tokens, 768), (1, 768)))
            return (image, weight, row, table, prefix, scale, scale) if full else (image, weight, *[None] * 5)

        return arguments

    def backward(batch: int, patch: int, pixels: str, image_grad: bool) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            image, weight, scale, tokens = tensors(batch, patch, pixels, dtype)
            return _empty(batch, tokens, 768, dtype=dtype), image, weight, scale, scale, tokens, 1, image_grad

        return arguments

    def bytes_moved(work: Work, pixels: str) -> Callable[[int], int]:
        return lambda itemsize: work.bytes(itemsize) - (itemsize - 1) * (pixels == "uint8") * 256 * 3 * 224 * 224

    yield Launch("patch_embed", "forward", "bare", forward(2, 16, "", False))
    for batch, patch, pixels in (
        (1, 16, ""),
        (2, 16, "scaled"),
        (2, 14, ""),
        (2, 14, "uint8"),
        (2, 14, "channels last"),
        (16384, 16, ""),
    ):
        label = f"{batch} x 224/{patch} {pixels}".rstrip()
        yield Launch("patch_embed", "forward", label, forward(batch, patch, pixels, True))
        yield Launch("patch_embed", "backward", label, backward(batch, patch, pixels, pixels != "uint8"))
    for pixels in ("", "uint8", "channels last"):
        shape, label = (256, 196, 768, 768, 1), f"256 x 224/16 {pixels}".rstrip()
        there, back = work.patch_embed(*shape), work.patch_embed_backward(*shape)
        call = forward(256, 16, pixels, True)
        yield Launch("patch_embed", "forward", label, call, there.flops, bytes_moved(there, pixels))
        call = backward(256, 16, pixels, False)
        yield Launch("patch_embed", "backward", label, call, back.flops, bytes_moved(back, pixels))
