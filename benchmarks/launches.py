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
    yield from _group_norm()
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


def _group_norm() -> Iterator[Launch]:
    def maps(B: int, C: int, positions: int, last: bool, dtype: torch.dtype) -> torch.Tensor:
        return _empty(B, positions, C, dtype=dtype).mT if last else _empty(B, C, positions, dtype=dtype)

    def forward(B: int, C: int, positions: int, groups: int, last: bool = False, affine: bool = True):
        def arguments(dtype: torch.dtype) -> tuple:
            row = _empty(C, dtype=dtype) if affine else None
            return maps(B, C, positions, last, dtype), groups, row, row, 1e-5, affine

        return arguments

    def backward(B: int, C: int, positions: int, groups: int, last: bool = False, affine: bool = True):
        def arguments(dtype: torch.dtype) -> tuple:
            row, x = _empty(C, dtype=dtype) if affine else None, maps(B, C, positions, last, dtype)
            statistics = _empty(B, groups, dtype=torch.float32)
            return x, x, statistics, statistics, row, row, affine

        return arguments

    B = 256
    for C, side in ((64, 112), (256, 56)):
        w = work.group_norm(B, C, side**2, 32, keep=True)
        yield Launch("group_norm", "forward", f"{C} x {side}²", forward(B, C, side**2, 32), w.flops, w.bytes)
        w = work.group_norm_backward(B, C, side**2, 32)
        yield Launch("group_norm", "backward", f"{C} x {side}²", backward(B, C, side**2, 32), w.flops, w.bytes)
    for label, shape in (
        ("channels last", (2, 512, 784, 32, True)),
        ("14² channels last", (2, 1024, 196, 32, True)),
        ("14²", (2, 1024, 196, 32)),
        ("odd without affine", (3, 21, 35, 7, False, False)),
        ("one channel", (1, 7, 1, 7)),
    ):
        yield Launch("group_norm", "forward", label, forward(*shape))
        yield Launch("group_norm", "backward", label, backward(*shape))


def _linear() -> Iterator[Launch]:
    def forward(
        M: int, K: int, C: int, activation: str = "none", bias: bool = True, residual: bool = False, full: bool = False
    ) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            x, weight, row = _empty(M, K, dtype=dtype), _empty(C, K, dtype=dtype), _empty(C, dtype=dtype)
            scale, samples = (row, _empty(8, dtype=dtype)) if full else (None, None)
            added = _empty(M, C, dtype=dtype) if residual else None
            return x, weight, row if bias else None, scale, added, activation, activation != "none", samples

        return arguments

    def backward(M: int, K: int, C: int, activation: str = "none", scaled: bool = False, full: bool = False):
        def arguments(dtype: torch.dtype) -> tuple:
            x, weight, row = _empty(M, K, dtype=dtype), _empty(C, K, dtype=dtype), _empty(C, dtype=dtype)
            dy = _empty(M, C, dtype=dtype)
            preact = dy if activation != "none" else _empty(0, dtype=dtype)
            return dy, x, weight, row, row if scaled else None, preact, activation, row[:8] if full else None

        return arguments

    yield Launch("linear", "forward", "bare", forward(1000, 768, 768, bias=False))
    yield Launch(
        "linear", "forward", "full gelu_tanh odd", forward(1000, 59, 767, "gelu_tanh", residual=True, full=True)
    )
    yield Launch("linear", "forward", "full gelu few rows", forward(8, 768, 768, "gelu", residual=True, full=True))
    yield Launch("linear", "forward", "full gelu in parts", forward(197, 3072, 768, "gelu", residual=True, full=True))
    yield Launch("linear", "backward", "full quick_gelu odd", backward(1000, 59, 767, "quick_gelu", True, True))
    yield Launch("linear", "backward", "full 197 rows", backward(197, 768, 3072, scaled=True, full=True))
    M, D, F = 256 * 197, 768, 3072
    for label, K, C, activation, residual in (
        ("ViT-B qkv", D, 3 * D, "none", False),
        ("ViT-B proj", D, D, "none", True),
        ("ViT-B fc1", D, F, "gelu", False),
        ("ViT-B fc2", F, D, "none", True),
    ):
        w = work.linear(M, K, C, activation != "none", residual, keep=True)
        arguments = forward(M, K, C, activation, residual=residual)
        yield Launch("linear", "forward", label, arguments, w.flops, w.bytes)
        w = work.linear_backward(M, K, C, activation != "none")
        arguments = backward(M, K, C, activation, scaled=residual)
        yield Launch("linear", "backward", label, arguments, w.flops, w.bytes)


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
        (1001, 1023, 131, "full", True, "quick_gelu"),
    ):
        arguments = forward(rows, width, hidden, kind, keep, activation)
        yield Launch("norm_mlp", "forward", f"{kind} {rows} x {width}", arguments)
        arguments = backward(rows, width, hidden, kind, activation)
        if width < 4096:
            yield Launch("norm_mlp", "backward", f"{kind} {rows} x {width}", arguments)


def _attention() -> Iterator[Launch]:
    def options(head_dim: int, keys: int, kind: str, dtype: torch.dtype) -> tuple:
        row = _empty(head_dim, dtype=dtype) if "norm" in kind else None
        eps = 1e-6 if "norm" in kind else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if "dropout" in kind else None
        lengths = torch.empty(257, dtype=torch.int32, device="meta") if "varlen" in kind else None
        rate = 0.1 if "dropout" in kind else 0.0
        return rate, seed, row, row, row, row, eps, eps, lengths, keys if "varlen" in kind else 0

    def tensors(batch: int, keys: int, head_dim: int, kind: str, dtype: torch.dtype) -> tuple:
        shape = (1, batch * keys) if "varlen" in kind else (batch, keys)
        packed = _empty(*shape, 3, 12, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)
        mask = None
        if "bool" in kind or "additive" in kind:
            mask = _empty(batch, 1, 1, keys, dtype=torch.bool if "bool" in kind else dtype)
            mask = mask.expand(batch, 12, keys, keys)
        return packed, (mask, "causal" in kind, 0.125, *options(head_dim, keys, kind, dtype))

    def forward(*case) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            packed, rest = tensors(*case, dtype)
            return *packed, *rest

        return arguments

    def backward(*case) -> Callable[[torch.dtype], tuple]:
        def arguments(dtype: torch.dtype) -> tuple:
            packed, rest = tensors(*case, dtype)
            out = packed[0].transpose(1, 2).new_empty(packed[0].transpose(1, 2).shape)
            lse = _empty(*packed[0].shape[:3], dtype=torch.float32)
            return out, *packed, out, lse, *packed, *rest

        return arguments

    for keys, head_dim in ((50, 64), (197, 64), (201, 64), (257, 64), (257, 80), (577, 64), (1025, 64)):
        label, case = f"{keys} x {head_dim}", (256, keys, head_dim, "")
        w = work.attention(256, 12, keys, keys, head_dim, keep=True)
        yield Launch("attention", "forward", label, forward(*case), w.flops, w.bytes)
        w = work.attention_backward(256, 12, keys, keys, head_dim)
        yield Launch("attention", "backward", label, backward(*case), w.flops, w.bytes)
    for batch, keys, head_dim, kind in (
        (256, 197, 64, "norm"),
        (256, 197, 64, "varlen"),
        (256, 577, 64, "varlen norm"),
        (2, 197, 64, ""),
        (256, 16, 32, ""),
        (256, 128, 72, ""),
        (2, 577, 128, ""),
        (2, 257, 256, ""),
        (2, 50, 64, "additive"),
        (2, 197, 64, "bool"),
        (2, 197, 64, "dropout"),
        (2, 577, 59, "bool"),
        (2, 577, 80, "additive causal norm"),
        (2, 129, 128, "bool norm dropout"),
        (2, 257, 256, "bool"),
        (2, 300, 128, "varlen dropout"),
        (2, 729, 72, ""),
    ):
        label = f"{keys} x {head_dim} {kind}".strip() + " few" * (batch == 2 and not kind and keys == 197)
        case = (batch, keys, head_dim, kind)
        yield Launch("attention", "forward", label, forward(*case))
        yield Launch("attention", "backward", label, backward(*case))


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
