"""The compiled extension ``fastvit._C``: loaded on first use, the CPU kernels' launchers and their limits.

``cpu`` holds one launcher per op, and ``native_cuda`` those of the CUDA kernels. A launcher's ``why_not`` and
``forward`` take the same arguments, in the order of the op's contract (see ``fastvit.ops``); ``why_not`` looks at
metadata only.
"""

import importlib
from dataclasses import dataclass
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from . import prepack
from .settings import SETTINGS
from .tracing import constant

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Options at the end of an op's contract that no CPU kernel takes yet: the contract's last arguments, in order.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "attention": ("dropout", "seed", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias", "q_eps", "k_eps"),
    "linear": ("sample_scale",),
    "layer_norm": ("sample_scale",),
    "norm_mlp": ("sample_scale",),
}

# Where the weights of linear layers are among an op's arguments: the CPU kernels take them packed as well.
_WEIGHTS: dict[str, tuple[int, ...]] = {"linear": (1,), "norm_mlp": (3, 5), "patch_embed": (1,)}

# What loading the extension said, and looking for a GPU: absent = not tried, empty = there.
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
    if "cuda" not in _failure:  # asked in every call
        built = build_info()["cuda_architectures"]
        missing = "" if torch.cuda.is_available() else "there is no CUDA device"
        _failure["cuda"] = missing if built else "the extension fastvit._C was built without CUDA (FASTVIT_BUILD=cuda)"
    return _failure["cuda"]


def why_unavailable(device_type: str) -> str | None:
    """Why the native kernels of a device type ("cpu" or "cuda") cannot run on this machine, or None when they can."""
    return _why_unavailable(device_type) or None


@dataclass(frozen=True)
class Launcher:
    """One op on a CPU. ``why_not`` answers a sentence or None, ``forward`` runs the kernel."""

    op: str

    def why_not(self, *args: Any) -> str | None:
        first, dtype = args[0], args[0].dtype
        if first.device.type != "cpu":
            return f"cpu kernels run on cpu tensors, got {first.device.type}"
        if self.op == "patch_embed":  # an image may be uint8, the parameters say in what dtype to compute
            dtype = args[1].dtype
        if dtype not in _DTYPES:
            expected = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            return f"cpu {self.op} computes in {expected}, got {str(dtype).removeprefix('torch.')}"
        options = _OPTIONS.get(self.op, ())
        for name, value in zip(options, args[len(args) - len(options) :], strict=True):
            if value is not None and (isinstance(value, torch.Tensor) or value != 0):
                return f"cpu {self.op} has no {name}"
        return why_unavailable("cpu")

    def forward(self, *args: Any) -> Any:
        _require()
        taken = args[: len(args) - len(_OPTIONS.get(self.op, ()))]
        # Numbers per channel are tensors in C++.
        taken = tuple(torch.tensor(a, dtype=torch.float32) if isinstance(a, (list, tuple)) else a for a in taken)
        packed = [prepack.weight_if_kept(taken[i]) for i in _WEIGHTS.get(self.op, ())]
        return getattr(torch.ops.fastvit_native, self.op)(*taken, *packed)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b of two matrices, by the faster of our product and PyTorch's."""
    # oneDNN's bfloat16 products are as fast as ours; MKL's float32 ones reach half of the peak on AMD processors.
    if a.dtype == torch.bfloat16:
        return torch.matmul(a, b)
    return torch.ops.fastvit_native.matmul(*(t if 1 in t.stride() else t.contiguous() for t in (a, b)))[0]


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
class GroupNorm(Launcher):
    """The launcher of group_norm, which has a backward of its own."""

    def backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        return torch.ops.fastvit_native.group_norm_backward(*args)


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
    """The launcher of attention, which has a backward of its own.

    Sequences in one row are read where they lie, neighbours of one length in one call.
    """

    def why_not(self, *args: Any) -> str | None:
        return super().why_not(*args[:-2])

    def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *taken, cu_seqlens, _ = args
        if cu_seqlens is None:
            return super().forward(*taken)
        q = taken[0]
        _, heads, total, width = q.shape
        out = q.new_empty(1, total, heads, width)
        # for the backward alone: (images, H, N) of one run behind those of another
        lse = q.new_empty(1, heads, total, dtype=torch.promote_types(q.dtype, torch.float32))
        for run in _runs(cu_seqlens, total):
            its_out, its_lse = super().forward(*(_rows(t, 2, run) for t in taken[:3]), *taken[3:])
            _rows(out, 1, run).copy_(its_out)
            _statistics(lse, run).copy_(its_lse)
        return out, lse

    def backward(self, dout: Any, *args: Any) -> tuple[None, None, None, None]:
        *taken, cu_seqlens, _ = args
        q, k, v, out, lse, dq, dk, dv, *rest = taken[: len(taken) - len(_OPTIONS["attention"])]
        launch, dout = torch.ops.fastvit_native.attention_backward, dout.contiguous()
        if cu_seqlens is None:
            launch(dout, q, k, v, out, lse, dq, dk, dv, *rest)
            return None, None, None, None
        for run in _runs(cu_seqlens, q.shape[2]):
            tensors = (_rows(t, 2, run) for t in (q, k, v))
            grads = (_rows(t, 2, run) for t in (dq, dk, dv))
            launch(_rows(dout, 1, run), *tensors, _rows(out, 1, run), _statistics(lse, run), *grads, *rest)
        return None, None, None, None


class _Run(NamedTuple):
    """Neighbouring sequences of one length: the first one's first row, how many they are, and the rows of each."""

    start: int
    images: int
    length: int


def _runs(cu_seqlens: torch.Tensor, total: int) -> list[_Run]:
    places = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(places)]
    if places[:1] != [0] or places[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"fastvit.attention_varlen: cu_seqlens must rise from 0 to {total}, the rows, got {places}")
    runs, start = [], 0
    for length, equal in groupby(lengths):
        images = len([*equal])
        if length:
            runs.append(_Run(start, images, length))
        start += images * length
    return runs


def _rows(tensor: torch.Tensor, dim: int, run: _Run) -> torch.Tensor:
    """A run's part of a row of tokens (dimension ``dim``, the first being 1) as a batch, a view."""
    part = tensor.narrow(dim, run.start, run.images * run.length)[0]
    return part.unflatten(dim - 1, (run.images, run.length)).movedim(dim - 1, 0)


def _statistics(lse: torch.Tensor, run: _Run) -> torch.Tensor:
    heads = lse.shape[1]
    part = lse.view(-1).narrow(0, heads * run.start, heads * run.images * run.length)
    return part.view(run.images, heads, run.length)


def _heads(qkv: torch.Tensor, shape: torch.Size, num_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k and v (B, H, N, E) as views of the packed rows (B·N, 3·D) of tokens of shape (B, N, D)."""
    batch, tokens, width = shape
    return qkv.view(batch, tokens, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4).unbind(0)


@dataclass(frozen=True)
class Block(Launcher):
    """The launcher of a training block: float32 tokens and parameters, products in float32 or, by autocast, bfloat16.

    bfloat16 copies of weights are never made: the products pack them from float32.
    """

    def why_not(self, *args: Any) -> str | None:
        x, compute, parameters = args[0], args[-1], args[1:15]
        if any(t is not None and t.dtype != torch.float32 for t in (x, *parameters)):
            return "cpu block takes float32 tokens and parameters"
        if compute not in ("float32", "bfloat16"):
            return f"cpu block computes in float32 and bfloat16, got {compute}"
        return super().why_not(*args)

    def forward(self, *args: Any) -> list[torch.Tensor]:
        _require()
        x, nw1, nb1, qkv_w, qkv_b, proj_w, proj_b, ls1, nw2, nb2, fc1_w, fc1_b, fc2_w, fc2_b, ls2 = args[:15]
        eps, num_heads, scale, activation, compute = args[15:]
        native, low = torch.ops.fastvit_native, compute == "bfloat16"
        rows = x.reshape(-1, x.shape[-1])
        n1, _, mean1, rstd1 = native.layer_norm(rows, None, None, nw1, nb1, eps[0], low)
        qkv, _ = native.linear(n1, qkv_w, qkv_b, None, None, "none", False, None)
        heads, lse = native.attention(*_heads(qkv, x.shape, num_heads), None, False, scale)
        heads = heads.view(rows.shape)
        mid, _ = native.linear(heads, proj_w, proj_b, ls1, rows, "none", False, None)
        n2, _, mean2, rstd2 = native.layer_norm(mid, None, None, nw2, nb2, eps[1], low)
        hidden, preact = native.linear(n2, fc1_w, fc1_b, None, None, activation, True, None)
        y, _ = native.linear(hidden, fc2_w, fc2_b, ls2, mid, "none", False, None)
        y = torch.ops.aten._unsafe_view.default(y, x.shape)  # no view: wrappers such as FSDP mind them
        return [y, n1, qkv, heads, lse, mid, n2, preact, mean1, rstd1, mean2, rstd2]

    def backward(self, dy: torch.Tensor, wanted: list[bool], *args: Any) -> list[torch.Tensor | None]:
        """The gradients of x and of the parameters, None for those that are not wanted."""
        x, nw1, _, qkv_w, _, proj_w, proj_b, ls1, nw2, _, fc1_w, _, fc2_w, fc2_b, ls2 = args[:15]
        (n1, qkv, heads, lse, mid, n2, preact, mean1, rstd1, mean2, rstd2), num_heads, scale, activation = args[15:]
        native, rows = torch.ops.fastvit_native, x.reshape(-1, x.shape[-1])
        d = dy.view(rows.shape)
        low = d.to(n1.dtype)
        up = low if ls2 is None else (d * ls2).to(n1.dtype)
        dpreact, hidden = native.matmul(up, fc2_w, preact, activation)
        dfc2 = _branch_gradients(low, hidden, fc2_w, fc2_b, ls2, wanted[12:15])
        dfc1 = _branch_gradients(dpreact, n2, fc1_w, None, None, (*wanted[10:12], False))
        dn2 = native.matmul(dpreact, fc1_w)[0]
        d, _, _, dnw2, dnb2 = native.layer_norm_backward(dn2, d, mid, mean2, rstd2, nw2, None, None)
        low = d.to(n1.dtype)
        up = low if ls1 is None else (d * ls1).to(n1.dtype)
        dproj = _branch_gradients(low, heads, proj_w, proj_b, ls1, wanted[5:8])
        dheads = native.matmul(up, proj_w)[0].view(*x.shape[:2], num_heads, x.shape[2] // num_heads)
        dqkv = torch.empty_like(qkv)
        grads, views = _heads(dqkv, x.shape, num_heads), _heads(qkv, x.shape, num_heads)
        native.attention_backward(dheads, *views, heads.view(dheads.shape), lse, *grads, None, False, scale)
        dqkv_parts = _branch_gradients(dqkv, n1, qkv_w, None, None, (*wanted[3:5], False))
        dn1 = native.matmul(dqkv, qkv_w)[0]
        dx, _, _, dnw1, dnb1 = native.layer_norm_backward(dn1, d, rows, mean1, rstd1, nw1, None, None)
        found = [dx.view(x.shape), dnw1, dnb1, *dqkv_parts[:2], *dproj, dnw2, dnb2, *dfc1[:2], *dfc2]
        return [gradient if need else None for gradient, need in zip(found, wanted, strict=True)]


def _branch_gradients(
    d: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    wanted: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The float32 gradients of weight, bias and LayerScale γ in γ (rows Wᵀ + b), d being that of the result.

    The result itself is not kept: with G = dᵀ rows, dγ = Σ_k W G + b Σ d and dW = γ G.
    """
    scaled = layer_scale is not None and wanted[2]
    G = torch.ops.fastvit_native.matmul(d.t(), rows, wide=True)[0] if wanted[0] or scaled else None
    total = torch.ops.fastvit_native.column_sum(d) if wanted[1] or scaled else None
    if layer_scale is None:
        return G, total, None
    dscale = None
    if scaled:
        assert G is not None and total is not None
        dscale = (weight * G).sum(1) if bias is None else (weight * G).sum(1) + bias * total
    G = None if G is None else G * layer_scale[:, None]
    return G, None if total is None else total * layer_scale, dscale


@dataclass(frozen=True)
class Encoder(Launcher):
    """The launcher of the encoder, whose parameters are packed once and kept; ``block`` is how it trains."""

    block: Block

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
    linear=Product("linear", ("product", "column_sum")),
    norm_mlp=Product("norm_mlp", ("product", "column_sum", "norm_backward")),
    patch_embed=Product("patch_embed", ("product",)),
    layer_norm=LayerNorm("layer_norm"),
    group_norm=GroupNorm("group_norm"),
    attention=Attention("attention"),
    encoder=Encoder("encoder", Block("encoder")),
)
