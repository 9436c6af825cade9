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
    def forward(rows: int, width: int, kind: str) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, row, samples = _empty(rows, width, dtype=dtype), _empty(width, dtype=dtype), _empty(8, dtype=dtype)
            layer_scale, sample_scale = (row, samples) if kind == "full" else (None, None)
            return x, None if kind == "plain" else x, layer_scale, row, row, 1e-6, sample_scale

        return arguments

    def backward(rows: int, width: int, kind: str) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, row, samples = _empty(rows, width, dtype=dtype), _empty(width, dtype=dtype), _empty(8, dtype=dtype)
            statistics = _empty(rows, dtype=torch.float32)
            scales = (x, row, samples) if kind == "full" else (None, None, None)
            return x, None if kind == "plain" else x, x, statistics, statistics, row, *scales

        return arguments

    M = 256 * 197
    for width in (192, 384, 768, 1024, 1280, 1408, 1664):
        for kind in ("plain", "residual", "full") if width in (192, 768, 1664) else ("residual",):
            w = work.layer_norm(M, width, residual=kind != "plain", keep=True)
            yield Launch("layer_norm", "forward", f"{kind} {width}", forward(M, width, kind), w.flops, w.bytes)
            w = work.layer_norm_backward(M, width, residual=kind != "plain", scaled=kind == "full")
            yield Launch("layer_norm", "backward", f"{kind} {width}", backward(M, width, kind), w.flops, w.bytes)
    for rows, width, kind in ((1, 1, "plain"), (197, 768, "full"), (5000, 1023, "full"), (5000, 4096, "full"),
                              (5000, 8192, "full"), (1000, 65537, "plain"), (1000, 65537, "full")):  # fmt: skip
        yield Launch("layer_norm", "forward", f"{kind} {rows} x {width}", forward(rows, width, kind))
        yield Launch("layer_norm", "backward", f"{kind} {rows} x {width}", backward(rows, width, kind))


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
    def tensors(rows: int, width: int, hidden: int, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        row, samples = _empty(width, dtype=dtype), _empty(8, dtype=dtype)
        vector = None if kind == "bare" else row
        return {
            "x": _empty(rows, width, dtype=dtype),
            "norm": vector,
            "fc1": _empty(hidden, width, dtype=dtype),
            "bias": None if kind == "bare" else _empty(hidden, dtype=dtype),
            "fc2": _empty(width, hidden, dtype=dtype),
            "scale": row if kind == "full" else None,
            "samples": samples if kind == "full" else None,
        }

    def forward(
        rows: int, width: int, hidden: int, kind: str, keep: bool, activation: str
    ) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            t = tensors(rows, width, hidden, kind, dtype)
            parameters = (t["norm"], t["norm"], t["fc1"], t["bias"], t["fc2"], t["norm"], t["scale"])
            return t["x"], *parameters, 1e-6, activation, kind != "bare", keep, t["samples"]

        return arguments

    def backward(rows: int, width: int, hidden: int, kind: str, activation: str) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            t = tensors(rows, width, hidden, kind, dtype)
            parameters = (t["norm"], t["norm"], t["fc1"], t["fc2"], t["norm"], t["scale"])
            statistics, preact = _empty(rows, dtype=torch.float32), _empty(rows, hidden, dtype=dtype)
            kept = (statistics, statistics, preact)
            return t["x"], t["x"], *parameters, *kept, activation, kind != "bare", t["samples"]

        return arguments

    for width in (192, 384, 768):
        M, F = 256 * 197, 4 * width
        for keep in (False, True):
            w = work.norm_mlp(M, width, F, keep)
            label = f"{width}" + " kept" * keep
            arguments = forward(M, width, F, "plain", keep, "gelu")
            yield Launch("norm_mlp", "forward", label, arguments, w.flops, w.bytes)
        w = work.norm_mlp_backward(M, width, F)
        yield Launch("norm_mlp", "backward", f"{width}", backward(M, width, F, "plain", "gelu"), w.flops, w.bytes)
    for rows, width, hidden, kind, keep, activation in (
        (20000, 128, 512, "bare", False, "none"),
        (20000, 256, 1024, "full", True, "gelu_tanh"),
        (1000, 65537, 3072, "bare", False, "quick_gelu"),
        (1000, 768, 3072, "full", True, "gelu"),
        (1001, 59, 131, "full", True, "quick_gelu"),
    ):
        arguments = forward(rows, width, hidden, kind, keep, activation)
        yield Launch("norm_mlp", "forward", f"{kind} {rows} x {width}", arguments)
        arguments = backward(rows, width, hidden, kind, activation)
        if width < 4096:
            yield Launch("norm_mlp", "backward", f"{kind} {rows} x {width}", arguments)


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
            # What a slice of a wider tensor hands back is read number by number.
            dy = (
                _empty(batch, tokens, 771, dtype=dtype)[..., :768]
                if pixels == "scaled"
                else _empty(batch, tokens, 768, dtype=dtype)
            )
            return dy, image, weight, scale, scale, tokens, 1, image_grad

        return arguments

    def bytes_moved(work: Work, pixels: str) -> Callable[[int], int]:
        return lambda itemsize: work.bytes(itemsize) - (itemsize - 1) * (pixels == "uint8") * 256 * 3 * 224 * 224

    yield Launch("patch_embed", "forward", "bare", forward(2, 16, "", False))
    yield Launch("patch_embed", "forward", "1 x 224/16", forward(1, 16, "", True))
    yield Launch("patch_embed", "backward", "2 x 224/16 scaled", backward(2, 16, "scaled", True))
    for batch, patch, pixels in ((2, 14, ""), (2, 14, "uint8"), (16384, 16, "")):
        label = f"{batch} x 224/{patch} {pixels}".rstrip()
        yield Launch("patch_embed", "forward", label, forward(batch, patch, pixels, True))
        yield Launch("patch_embed", "backward", label, backward(batch, patch, pixels, pixels != "uint8"))
    for pixels in ("", "uint8"):
        shape, label = (256, 196, 768, 768, 1), f"256 x 224/16 {pixels}".rstrip()
        there, back = work.patch_embed(*shape), work.patch_embed_backward(*shape)
        call = forward(256, 16, pixels, True)
        yield Launch("patch_embed", "forward", label, call, there.flops, bytes_moved(there, pixels))
        call = backward(256, 16, pixels, False)
        yield Launch("patch_embed", "backward", label, call, back.flops, bytes_moved(back, pixels))
