"""The compiled extension ``fastvit._C``: loaded on first use, its launchers and their limits.

``cpu`` and ``cuda`` hold one launcher per op. A launcher's ``why_not`` and ``forward`` take the same arguments, in the
order of the op's contract (see ``fastvit.ops``); ``why_not`` looks at metadata only.
"""

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from . import prepack
from .settings import SETTINGS
from .tracing import constant

_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

# Options at the end of an op's contract that no native kernel takes yet: the contract's last arguments, in order.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("dropout", "seed", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias", "q_eps", "k_eps"),
        *("cu_seqlens", "max_seqlen"),
    ),
    "linear": ("sample_scale",),
    "layer_norm": ("sample_scale",),
    "norm_mlp": ("sample_scale",),
}

# Where the weights of linear layers are among an op's arguments: the CPU kernels take them packed as well.
_WEIGHTS: dict[str, tuple[int, ...]] = {"linear": (1,), "norm_mlp": (3, 5), "patch_embed": (1,)}

# What loading the extension said: absent = not tried, empty = loaded.
_failure: dict[str, str] = {}


@constant
def _load() -> str:
    """Load the extension once; why that failed, or an empty string."""
    if "reason" not in _failure:
        try:
            importlib.import_module("fastvit._C")
            if SETTINGS.cpu:
                torch.ops.fastvit_native.cpu_isa(SETTINGS.cpu)
        except ModuleNotFoundError:
            _failure["reason"] = "the extension fastvit._C is not built (python setup.py build_ext --inplace)"
        except (ImportError, OSError, RuntimeError) as error:
            _failure["reason"] = f"the extension fastvit._C does not load: {str(error).splitlines()[0]}"
        else:
            _failure["reason"] = ""
    return _failure["reason"]


def build_info() -> dict[str, Any]:
    """How the extension was built: version, compiler, torch_target, cpu_compiled, cpu_detected, cpu_active,
    cuda_architectures.

    Raises:
        ImportError: the extension is missing or does not load; the message says why.
    """
    _require()
    return importlib.import_module("fastvit._C").build_info()


def _require() -> None:
    failure = _load()
    if failure:
        raise ImportError(f"fastvit: {failure}")


@constant
def _why_unavailable(device_type: str) -> str:
    failure = _load()
    if failure or device_type == "cpu":
        return failure
    if not build_info()["cuda_architectures"]:
        return "the extension fastvit._C was built without CUDA (FASTVIT_BUILD=cuda)"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


def why_unavailable(device_type: str) -> str | None:
    """Why the native kernels of a device type ("cpu" or "cuda") cannot run on this machine, or None when they can."""
    return _why_unavailable(device_type) or None


@dataclass(frozen=True)
class Launcher:
    """One op on one device type. ``why_not`` answers a sentence or None, ``forward`` runs the kernel."""

    op: str
    device_type: str

    def why_not(self, *args: Any) -> str | None:
        first, dtype = args[0], args[0].dtype
        if first.device.type != self.device_type:
            return f"{self.device_type} kernels run on {self.device_type} tensors, got {first.device.type}"
        if self.op == "patch_embed":  # an image may be uint8, the parameters say in what dtype to compute
            dtype = args[1].dtype
        if dtype not in _DTYPES[self.device_type]:
            expected = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[self.device_type])
            return f"{self.device_type} {self.op} computes in {expected}, got {str(dtype).removeprefix('torch.')}"
        options = _OPTIONS.get(self.op, ())
        for name, value in zip(options, args[len(args) - len(options) :], strict=True):
            if value is not None and (isinstance(value, torch.Tensor) or value != 0):
                return f"{self.device_type} {self.op} has no {name}"
        return why_unavailable(self.device_type)

    def forward(self, *args: Any) -> Any:
        _require()
        taken = args[: len(args) - len(_OPTIONS.get(self.op, ()))]
        # Numbers per channel are tensors in C++.
        taken = tuple(torch.tensor(a, dtype=torch.float32) if isinstance(a, (list, tuple)) else a for a in taken)
        weights = _WEIGHTS.get(self.op, ()) if self.device_type == "cpu" else ()
        packed = [prepack.weight_if_kept(taken[i]) for i in weights]
        return getattr(torch.ops.fastvit_native, self.op)(*taken, *packed)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b of two matrices, by the faster of our product and PyTorch's."""
    # oneDNN's bfloat16 products are as fast as ours, and faster where a must be transposed; MKL's float32 ones reach
    # half of the peak on AMD processors.
    if a.dtype == torch.bfloat16:
        return torch.matmul(a, b)
    return torch.ops.fastvit_native.matmul(*(t if 1 in t.stride() else t.contiguous() for t in (a, b)))


def _layer_norm_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    *taken, sample_scale = args
    assert sample_scale is None, "the forward refuses it"
    return torch.ops.fastvit_native.layer_norm_backward(*taken)


@dataclass(frozen=True)
class LayerNorm(Launcher):
    """The launcher of layer_norm, which has a backward of its own."""

    def backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return _layer_norm_backward(*args)


@dataclass(frozen=True)
class Product(Launcher):
    """A launcher whose backward is the reference's with these parts of ours."""

    parts: tuple[str, ...]

    @property
    def backward_parts(self) -> dict[str, Any]:
        ours = {"product": matmul, "norm_backward": _layer_norm_backward}
        return {name: ours.get(name) or getattr(torch.ops.fastvit_native, name) for name in self.parts}


@dataclass(frozen=True)
class Attention(Launcher):
    """The launcher of attention, which has a backward of its own."""

    def backward(self, dout: Any, *args: Any) -> tuple[None, None, None, None]:
        taken = args[: len(args) - len(_OPTIONS["attention"])]
        torch.ops.fastvit_native.attention_backward(dout.contiguous(), *taken)
        return None, None, None, None


@dataclass(frozen=True)
class Encoder(Launcher):
    """The launcher of the encoder, whose parameters are packed once and kept."""

    def why_not(self, *args: Any) -> str | None:
        x, compute = args[0], args[6]
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or compute == "float64":
            return f"cpu encoder computes in float32, bfloat16, float16, got {str(x.dtype).removeprefix('torch.')}"
        return super().why_not(*args)

    def forward(self, *args: Any) -> Any:
        _require()
        x, parameters, eps, heads, scale, activation, compute, int8 = args
        # A product of float16 is computed in float32.
        packed = prepack.encoder(parameters, "float32" if compute == "float16" else compute, int8)
        return torch.ops.fastvit_native.encoder(x.contiguous(), packed, eps, heads, scale, activation)


cpu = SimpleNamespace(
    linear=Product("linear", "cpu", ("product", "column_sum")),
    norm_mlp=Product("norm_mlp", "cpu", ("product", "column_sum", "norm_backward")),
    patch_embed=Product("patch_embed", "cpu", ("product",)),
    layer_norm=LayerNorm("layer_norm", "cpu"),
    attention=Attention("attention", "cpu"),
    encoder=Encoder("encoder", "cpu"),
)
cuda = SimpleNamespace(layer_norm=Launcher("layer_norm", "cuda"))
