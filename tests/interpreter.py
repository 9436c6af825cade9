"""Triton's interpreter, set up for tests on a machine without a GPU, with its faults repaired.

Import order matters: ``install`` must run before any module that defines a kernel.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch


def install() -> bool:
    """Make Triton interpret kernels here if there is no GPU; returns whether it does."""
    if torch.cuda.is_available():
        return False
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from triton.runtime import interpreter
    except ImportError:
        return False
    if not getattr(interpreter, "fastvit_repaired", False):
        interpreter.fastvit_repaired = True
        _repair_conversion(interpreter)
        _repair_dot(interpreter)
        _silence(interpreter)
        _patch_once(interpreter)
    return True


def _repair_conversion(interpreter: Any) -> None:
    """fp32 -> bf16 drops the carry of a mantissa that rounds up to the next power of two: 1.999 becomes 1."""
    import numpy as np
    import triton.language as tl

    original = interpreter._convert_float

    def convert(source: Any, source_dtype: Any, result_dtype: Any, rounding: Any) -> Any:
        if source_dtype == tl.bfloat16 and result_dtype == tl.float32:
            return (source.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if source_dtype == tl.float32 and result_dtype == tl.bfloat16:
            bits = np.ascontiguousarray(source).view(np.uint32)
            to_even = ((bits >> 16) + ((bits >> 15) & 1 & (((bits & 0x7FFF) != 0) | (bits >> 16)))).astype(np.uint16)
            return np.where(np.isnan(source), np.uint16(0x7FC0), to_even)
        return original(source, source_dtype, result_dtype, rounding)

    interpreter._convert_float = convert


def _repair_dot(interpreter: Any) -> None:
    """A bf16 dot multiplies the bit patterns: decode them first."""
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any, **options: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return original(self, a, b, *rest, **options)

    builder.create_dot = create_dot


def _silence(interpreter: Any) -> None:
    """A GPU raises no warning where NumPy does: overflow to Inf, Inf - Inf, a row of NaN."""
    import numpy as np

    original = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **options: Any) -> None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            original(self, *args, **options)

    interpreter.GridExecutor.__call__ = call


def _patch_once(interpreter: Any) -> None:
    """Each call of a device function swaps triton.language for NumPy again: once per launch and module will do."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in done:
            return None
        done.add(id(fn.__globals__))
        return patch(fn)

    def call(self: Any, *args: Any, **options: Any) -> None:
        done.clear()
        launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, call
