"""Hugging Face ``kernels``: our LayerNorm and MLP as kernel layers, mapped in this process and loaded from no hub.

``kernels.kernelize`` puts the forward of a layer class on modules of other classes. Such a class has no ``__init__``
and no members but ``has_backward`` and ``can_torch_compile``, takes the arguments of the forward it replaces, and
reads everything else from the module it is put on. A mapping's values are objects with ``load()``.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..fused import active, has_hooks
from ..parts import activation_name

DEVICES = ("cpu", "cuda", "rocm")
# transformers' activations, by the names of the ops
_LINEARS = (("fc1", "fc2"), ("up_proj", "down_proj"))
_IDLE = (nn.Identity, nn.Dropout)


def _layers_of(mlp: nn.Module) -> tuple[nn.Linear, nn.Linear, str] | None:
    """The two linear layers and the activation between them, or None where the MLP does more or knows another one."""
    children = dict(mlp.named_children())
    for names in _LINEARS:
        first, second = (children.pop(name, None) for name in names)
        if type(first) is nn.Linear and type(second) is nn.Linear:
            break
    else:
        return None
    rest = [child for child in children.values() if not isinstance(child, _IDLE)]
    if len(rest) != 1 or has_hooks(mlp) or any(active(c) for c in children.values() if isinstance(c, nn.Dropout)):
        return None
    name = activation_name(rest[0])
    return None if name is None else (first, second, name)


class LayerNorm(nn.Module):
    """Put on a torch.nn.LayerNorm: :func:`fastvit.ops.layer_norm` over the last dimension, torch's over several."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        norm: Any = self
        if len(norm.normalized_shape) != 1:
            return F.layer_norm(input, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return ops.layer_norm(input, norm.weight, norm.bias, norm.eps)


class MLP(nn.Module):
    """Put on an MLP of two linear layers and a GELU, by transformers' names or timm's: two :func:`fastvit.ops.linear`.

    With another activation, a dropout that drops, a gate, other linear layers or hooks inside, its own forward runs.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        layers = _layers_of(self)
        if layers is None:
            return type(self).forward(self, hidden_states)
        first, second, activation = layers
        hidden_states = ops.linear(hidden_states, first.weight, first.bias, activation=activation)
        return ops.linear(hidden_states, second.weight, second.bias)


# layer name -> class; the MLPs bear the names of transformers' classes
LAYERS: dict[str, type[nn.Module]] = {
    "LayerNorm": LayerNorm,
    **dict.fromkeys(
        ("ViTMLP", "DeiTMLP", "Dinov2MLP", "DINOv3ViTMLP", "BeitMLP", "CLIPMLP", "SiglipMLP", "ViTMAEMLP"), MLP
    ),
}


@dataclass(frozen=True)
class InProcess:
    """Stands where ``kernels`` has a repository of its hub: ``load()`` gives the layer's class."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return LAYERS[self.layer_name]

    def __str__(self) -> str:
        return f"fastvit, layer `{self.layer_name}`"


def mapping() -> dict[str, dict[str, InProcess]]:
    """{layer name: {device type: what loads it}}, as ``kernels.use_kernel_mapping`` takes it for a while."""
    return {name: dict.fromkeys(DEVICES, InProcess(name)) for name in LAYERS}


def register() -> None:
    """Add our layers to the mapping of the ``kernels`` package; modules change when they are kernelized.

    ::

        fastvit.integrations.hf_kernels.register()
        kernels.replace_kernel_forward_from_hub(torch.nn.LayerNorm, "LayerNorm")    # classes that nobody has marked
        kernels.replace_kernel_forward_from_hub(ViTMLP, "ViTMLP")
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda")

    Calling it again changes nothing. The layers train and compile; they take every mode.

    Raises:
        ImportError: the package is absent, or has no ``register_kernel_mapping``.
    """
    try:
        add = importlib.import_module("kernels").register_kernel_mapping
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "fastvit.integrations.hf_kernels.register: needs Hugging Face's kernels package (pip install kernels) with "
            f"register_kernel_mapping: {error}"
        ) from error
    add(mapping())
