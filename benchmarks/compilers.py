"""torch.compile in its stronger forms, and the compilers that plug into it: one forward pass each."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from . import measure


def freezing(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    """Weights as constants, packed ahead; the option alone does nothing, but keeps these graphs apart from others'."""
    return _constant("compile-freezing", {"options": {"freezing": True}}, model, batch)


def zentorch(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    """AMD's plug-in: kernels of its own in PyTorch's compiler."""
    return _constant("zentorch", {"backend": "zentorch"}, model, batch)


def max_autotune(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    """Kernels tried one against the other; on a GPU replayed as a CUDA graph, on a CPU with constant weights."""
    return _constant("compile-max-autotune", {"mode": "max-autotune"}, model, batch)


def tensorrt(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    """NVIDIA's engine builder on the exported graph, in the model's own dtypes."""
    import torch_tensorrt

    exported = torch.export.export(model, (batch,))
    engine = torch_tensorrt.dynamo.compile(exported, inputs=[batch], use_explicit_typing=True, min_block_size=1)
    return [measure.Provider("tensorrt", functools.partial(engine, batch))]


def _constant(name: str, how: Mapping[str, Any], model: torch.nn.Module, batch: torch.Tensor) -> list[measure.Provider]:
    """torch.compile with the weights as constants; the setting counts only while it is global.

    zentorch leaves a pass of its own in the compiler's settings, where others would inherit it.
    """
    import torch._inductor.config as inductor

    compiled = torch.compile(model, **how)
    restored = {
        "freezing": not batch.is_cuda,
        "joint_custom_post_pass": inductor.joint_custom_post_pass,
        "autotune_num_choices_displayed": 0,
    }
    with inductor.patch(restored), torch.inference_mode():
        for _ in range(3 if batch.is_cuda else 1):  # a CUDA graph is recorded in the second call
            compiled(batch)
    return [measure.Provider(name, functools.partial(compiled, batch))]
