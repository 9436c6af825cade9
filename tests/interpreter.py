"""Triton's interpreter, set up for tests on a machine without a GPU, with its faults repaired.

Import order matters: ``install`` must run before any module that defines a kernel.
"""

from __future__ import annotations

import dataclasses
import inspect
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
        _leave_out_what_is_discarded(interpreter)
        _remember_types(interpreter)
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
    """Each call of a device function swaps triton.language for NumPy again: once per launch and module will do.

    What there is to swap is looked up once for all.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()
    names: dict[Any, list[str]] = {}

    def patch_builtins(namespace: Any, *rest: Any) -> None:
        is_builtin = interpreter.tl.core.is_builtin
        if namespace not in names:
            names[namespace] = [name for name, member in inspect.getmembers(namespace) if is_builtin(member)]
        for name in names[namespace]:
            member = getattr(namespace, name)
            if is_builtin(member):
                interpreter._patch_attr(namespace, name, member, *rest)

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in done:
            return None
        done.add(id(fn.__globals__))
        return patch(fn)

    def call(self: Any, *args: Any, **options: Any) -> None:
        done.clear()
        launch(self, *args, **options)

    interpreter._patch_builtin = patch_builtins
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, call


def _leave_out_what_is_discarded(interpreter: Any) -> None:
    """Each sum and product of integers is computed three times for an assertion that is dropped outside debug mode."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _remember_types(interpreter: Any) -> None:
    """Types of blocks, what a tensor says of its type, and NumPy's name for it: made once per launch, not per value."""
    import triton.language as tl

    launch, numpy_type = interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    block_type, tensor = tl.core.block_type, tl.core.tensor
    make_type, make_tensor = block_type.__init__, tensor.__init__
    types: dict[tuple[int, tuple[int, ...]], Any] = {}
    facts: dict[int, dict[str, Any]] = {}
    numpy_types: dict[str, Any] = {}

    def new_type(cls: Any, element_ty: Any, shape: Any) -> Any:
        # The type that is kept keeps the element's type alive, and so its id.
        key = id(element_ty), tuple(getattr(size, "value", size) for size in shape)
        if key not in types:
            made = object.__new__(cls)
            make_type(made, element_ty, shape)
            types[key] = made
        return types[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        known = facts.get(id(type))
        if known is None:
            make_tensor(self, handle, type)
            facts[id(type)] = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            vars(self).update(known, handle=handle)

    def named_once(type: Any) -> Any:
        scalar = type.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(scalar)
        return numpy_types[scalar.name]

    def call(self: Any, *args: Any, **options: Any) -> None:
        types.clear()
        facts.clear()
        launch(self, *args, **options)

    block_type.__new__, block_type.__init__ = staticmethod(new_type), lambda self, element_ty, shape: None
    tensor.__init__, interpreter._get_np_dtype, interpreter.GridExecutor.__call__ = init_tensor, named_once, call
