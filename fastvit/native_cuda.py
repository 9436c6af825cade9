"""The CUDA C++ kernels of ``fastvit._C``: their launchers and limits. Equal in signature to those of ``native``."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import native
from .tracing import constant

MAX_HEAD_DIM = 128
MAX_CHANNELS = 16


# What each device was found to be: asked in every call.
_reasons: dict[int, str] = {}


@constant
def _why_not_device(index: int) -> str:
    """Why the compiled kernels do not run on a device, in one sentence; empty if they do."""
    if index not in _reasons:
        _reasons[index] = _judge(torch.cuda.get_device_capability(index))
    return _reasons[index]


def _judge(capability: tuple[int, int]) -> str:
    major, minor = capability
    if major < 8:
        return f"cuda kernels need compute capability 8.0 or newer, this device has {major}.{minor}"
    built = native.build_info()["cuda_architectures"]
    if any(_runs_on(code, 10 * major + minor) for code in built):
        return ""
    return f"the extension was built for {', '.join(built)}, not for compute capability {major}.{minor}"


def _runs_on(code: str, capability: int) -> bool:
    """Whether code for "sm_86", "sm_90a" or "compute_80" runs on a device, 86 being the capability 8.6."""
    kind, _, number = code.partition("_")
    built_for = int(number.rstrip("af"))
    if number.endswith("a") or kind == "compute":  # of one chip alone, or for the driver to compile
        return built_for == capability or (kind == "compute" and not number.endswith("a") and built_for <= capability)
    return built_for // 10 == capability // 10 and built_for <= capability


@dataclass(frozen=True)
class Launcher:
    """One op. ``why_not`` looks at metadata only and answers a sentence or None; ``forward`` runs the kernel.

    ``namespace`` and ``device_type`` say where the compiled ops are: tests run them emulated, on CPU tensors.
    """

    op: str
    dtypes: tuple[torch.dtype, ...]
    namespace: str = "fastvit_native"
    device_type: str = "cuda"

    @property
    def native(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def _why_not(self, x: Tensor) -> str | None:
        """What every op asks of the tensor that says where and in what dtype to compute."""
        if x.device.type != self.device_type:
            return f"cuda kernels run on {self.device_type} tensors, got {x.device.type}"
        if x.dtype not in self.dtypes:
            expected = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"cuda {self.op} computes in {expected}, got {str(x.dtype).removeprefix('torch.')}"
        if self.device_type != "cuda":
            return None
        return native.why_unavailable("cuda") or _why_not_device(x.device.index or 0) or None


def _aligned(t: Tensor) -> bool:
    """Whether heads begin at multiples of 16 bytes and lie there in one piece."""
    unit = 16 // t.element_size()
    if t.stride(-1) != 1 or any(n % unit for n in t.stride()[:-1]):
        return False
    return torch.compiler.is_compiling() or t.storage_offset() % unit == 0  # torch.compile cannot ask for the latter


def _aligned_or_copied(t: Tensor) -> Tensor:
    """What a graph was compiled for may begin anywhere in its memory."""
    return t if _aligned(t) else t.contiguous()


@dataclass(frozen=True)
class Attention(Launcher):
    def why_not(
        self, q, k, v, mask, causal, scale, dropout, seed, qw, qb, kw, kb, q_eps, k_eps, cu_seqlens, max_seqlen
    ) -> str | None:  # fmt: skip
        if dropout:
            return "cuda attention has no dropout"
        if q_eps is not None or k_eps is not None:
            return "cuda attention does not normalise queries and keys"
        head_dim = q.shape[-1]
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            return f"cuda attention takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dtype in self.dtypes and not _aligned(t):
                return f"cuda attention needs heads of {name} to begin at multiples of 16 bytes"
        return self._why_not(q)

    def forward(self, q, k, v, mask, causal, scale, *options: Any) -> tuple[Tensor, Tensor]:
        q, k, v = map(_aligned_or_copied, (q, k, v))
        return self.native.attention(q, k, v, mask, causal, scale, *options[-2:])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, mask, causal, scale, *options: Any) -> tuple[None, ...]:
        tensors = (*map(_aligned_or_copied, (dout, q, k, v)), out, lse, dq, dk, dv)
        self.native.attention_backward(*tensors, mask, causal, scale, *options[-2:])
        return None, None, None, None


@dataclass(frozen=True)
class LayerNorm(Launcher):
    def why_not(self, x, residual, layer_scale, weight, bias, eps, sample_scale) -> str | None:
        return self._why_not(x)

    def forward(self, x, residual, layer_scale, weight, bias, eps, sample_scale) -> tuple[Tensor, ...]:
        return self.native.layer_norm(x, residual, layer_scale, weight, bias, eps, False, sample_scale)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        return self.native.layer_norm_backward(*args)


@dataclass(frozen=True)
class Product(Launcher):
    """An op made of matrix products, which are the library's; its backward is the reference's with parts of ours."""

    def _activation_backward(self, dy: Tensor, preact: Tensor, activation: str) -> Tensor:
        return self.native.activation_backward(dy if dy.stride(-1) == 1 else dy.contiguous(), preact, activation)

    @property
    def backward_parts(self) -> dict[str, Any]:
        return {"activation_backward": self._activation_backward}


@dataclass(frozen=True)
class Linear(Product):
    def why_not(self, x, weight, bias, layer_scale, residual, activation, keep_preact, sample_scale) -> str | None:
        return self._why_not(x)

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        *taken, sample_scale = args
        return self.native.linear(*taken, None, sample_scale)


@dataclass(frozen=True)
class NormMlp(Product):
    @property
    def backward_parts(self) -> dict[str, Any]:
        return {**super().backward_parts, "norm_backward": self.native.layer_norm_backward}

    def why_not(self, x, *args: Any) -> str | None:
        return self._why_not(x)

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *taken, sample_scale = args
        return self.native.norm_mlp(*taken, None, None, sample_scale)


@dataclass(frozen=True)
class PatchEmbed(Launcher):
    def why_not(self, image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift) -> str | None:
        if pixel_scale is not None and len(pixel_scale) > MAX_CHANNELS:
            return f"cuda patch_embed normalises images of at most {MAX_CHANNELS} channels, got {len(pixel_scale)}"
        return self._why_not(weight)

    def forward(self, image, weight, bias, pos_embed, prefix, *factors: Any) -> Tensor:
        # They travel with the launch: as tensors on the CPU, so that the device is not waited for.
        scale, shift = (None if f is None else torch.tensor(f, dtype=torch.float32, device="cpu") for f in factors)
        return self.native.patch_embed(image, weight, bias, pos_embed, prefix, scale, shift, None)


@dataclass(frozen=True)
class Encoder(Launcher):
    """Whole blocks by one call of the dispatcher: what a model at batch 1 spends in Python stays out of it."""

    def why_not(self, x, parameters, eps, num_heads, scale, activation, compute, int8) -> str | None:
        if int8:
            return "cuda encoder has no int8 products"
        if compute != str(x.dtype).removeprefix("torch."):
            return f"cuda encoder computes in its tokens' dtype, not in autocast's {compute}"
        head_dim = x.shape[-1] // num_heads
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            return f"cuda encoder takes head dims that are multiples of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
        return self._why_not(x)

    def forward(self, x, parameters, eps, num_heads, scale, activation, compute, int8) -> Tensor:
        absent = x.new_empty(0)
        tensors = [absent if t is None else t for t in parameters]
        return self.native.encoder(x.contiguous(), tensors, eps, num_heads, scale, activation)


def launchers(namespace: str = "fastvit_native", device_type: str = "cuda") -> SimpleNamespace:
    """One launcher per op."""
    low, all_three = (torch.float16, torch.bfloat16), (torch.float32, torch.float16, torch.bfloat16)
    where = {"namespace": namespace, "device_type": device_type}
    return SimpleNamespace(
        attention=Attention("attention", low, **where),
        encoder=Encoder("encoder", low, **where),
        layer_norm=LayerNorm("layer_norm", all_three, **where),
        linear=Linear("linear", all_three, **where),
        norm_mlp=NormMlp("norm_mlp", all_three, **where),
        patch_embed=PatchEmbed("patch_embed", all_three, **where),
    )


cuda = launchers()
