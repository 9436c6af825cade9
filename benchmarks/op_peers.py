"""Who else computes an op: torch.compile, oneDNN's packed product, other libraries; imported only where measured.

A peer that is absent, or does not do a dtype or a direction, is named with the reason. All get the tensors that eager
gets, as strided views where their layout is another. What may be made of weights ahead of time is made once, before
the clock starts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op_calls, peers
from .op_calls import EPS, PER_IMAGE, Tensors
from .op_cases import GROUPS, OPS, OpCase

Function = Callable[..., Tensor]

_PACKED = "it reads weights packed ahead of time, which training would pack anew in every step"
_HALF = {"float32": "it computes in half precision only"}


def forward_only(reason: str) -> dict[str, str]:
    """The directions that a peer without a backward lacks."""
    return dict.fromkeys(("backward", "forward+backward"), reason)


@dataclass(frozen=True)
class Peer:
    """build: a case -> a function of its tensors by name.

    ops: the cases it takes. modules: what it imports; install: the command for it. device: where it runs, "" anywhere;
    elsewhere: why nowhere else, empty where a peer of the same name stands in. lacks: a dtype or direction it does not
    do -> why. scope: entered around every run.
    """

    name: str
    ops: tuple[str, ...]
    build: Callable[[OpCase], Function]
    modules: tuple[str, ...] = ()
    install: str = ""
    device: str = ""
    elsewhere: str = "it needs a GPU"
    lacks: Mapping[str, str] = field(default_factory=dict)
    scope: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot be measured on this machine, in one sentence, or None."""
        if self.device not in ("", device.type):
            return self.elsewhere
        return peers.why_absent(self.modules, self.install)

    def takes(self, case: OpCase) -> bool:
        """Whether it computes a case, where it can be measured at all."""
        return case.op in self.ops and case.dtype not in self.lacks and case.direction not in self.lacks


def left_out(chosen: Iterable[Peer], device: torch.device, cases: Sequence[OpCase]) -> dict[str, str]:
    """The peers that take no part in some of the cases, by name and where it matters dtype or direction, and why."""
    found = {}
    for peer in chosen:
        asked = [what for case in cases if case.op in peer.ops for what in (case.dtype, case.direction)]
        reason = peer.why_not(device)
        if asked and reason:
            found[peer.name] = reason
        elif asked and reason is None:
            lacking = [what for what in dict.fromkeys(asked) if what in peer.lacks]
            found.update({f"{peer.name} ({what})": peer.lacks[what] for what in lacking})
    return found


class Once:
    """What is made of weights, made when they are first seen; weights are told apart by the first one's address."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self._made = make, dict[int, Any]()

    def __call__(self, weight: Tensor, *others: Any) -> Any:
        address = weight.data_ptr()
        if address not in self._made:
            self._made[address] = self._make(weight, *others)
        return self._made[address]


def _compiled(mode: str | None, case: OpCase) -> Function:
    return torch.compile(op_calls.call(case).eager, dynamic=False, mode=mode)


@contextlib.contextmanager
def _compiling(**settings: Any) -> Iterator[None]:
    """What a compiler is told while it compiles: to keep what a second backward needs, and to print no tables."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    known = {name: value for name, value in quiet.items() if hasattr(inductor, name)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(inductor.patch(known | settings))
        if hasattr(functorch, "donated_buffer"):
            stack.enter_context(functorch.patch(donated_buffer=False))
        yield


class _Constant(torch.nn.Module):
    """An op whose weights are its own, so that a compiler may take them for constants."""

    def __init__(self, function: Function, weights: Tensors) -> None:
        super().__init__()
        self._function = function
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, **images: Tensor) -> Tensor:
        return self._function(**images, **dict(self.named_buffers()))


def _frozen(case: OpCase) -> Function:
    """torch.compile that packs weights ahead, as constants, and tries its own products against oneDNN's and MKL's.

    The settings count only while they are global.
    """
    call = op_calls.call(case)
    images = [name for name in call.shapes if name in PER_IMAGE]
    weights = [name for name in call.shapes if name not in PER_IMAGE]

    def make(address: Tensor, given: Tensors) -> Function:
        module = _Constant(call.eager, {name: given[name] for name in weights}).eval()
        settings = {"freezing": True, "max_autotune": True}
        compiled = torch.compile(module, dynamic=False, options=settings)
        with _compiling(**settings):
            compiled(**{name: given[name] for name in images})
        return compiled

    modules = Once(make)

    def run(**given: Tensor) -> Tensor:
        return modules(given[[*weights, *images][0]], given)(**{name: given[name] for name in images})

    return run


def _packed(case: OpCase) -> Function:
    """oneDNN's product of packed weights, with GELU or the residual inside it."""
    pack = Once(lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, case.batch * case.tokens))
    plain, with_residual = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._linear_pointwise.binary

    def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, activation="none") -> Tensor:
        if residual is not None:
            return with_residual(x, residual, pack(weight), bias, "add")
        return plain(x, pack(weight), bias, activation, [], "none" if activation == "gelu" else "")

    def norm_mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
        normed = F.layer_norm(x, (case.width,), norm_weight, norm_bias, EPS)
        return linear(linear(normed, fc1_weight, fc1_bias, activation="gelu"), fc2_weight, fc2_bias, x)

    def block(x: Tensor, **p: Tensor) -> Tensor:
        normed = F.layer_norm(x, (case.width,), p["norm1_weight"], p["norm1_bias"], EPS)
        heads = op_calls.attend(case, linear(normed, p["qkv_weight"], p["qkv_bias"]))
        x = linear(heads, p["proj_weight"], p["proj_bias"], x)
        mlp = (p[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
        return norm_mlp(x, p["norm2_weight"], p["norm2_bias"], *mlp)

    if case.op == "linear_fc1":
        return functools.partial(linear, activation="gelu")
    return {"norm_mlp": norm_mlp, "block": block}.get(case.op, linear)


def _heads(case: OpCase, qkv: Tensor) -> Tensor:
    """Packed qkv (B, N, 3·D) as a view (B, N, 3, H, E), the order in which these libraries want it."""
    return qkv.view(qkv.shape[0], case.tokens, 3, case.heads, case.head_dim)


def _first(result: Any) -> Tensor:
    """The output, which some versions return beside the log-sum-exp."""
    return result[0] if isinstance(result, (tuple, list)) else result


def _flash_packed(module: str, case: OpCase) -> Function:
    """Versions 2 and 3, by the function whose backward writes one gradient of qkv instead of joining three."""
    attend = _attribute(module, "flash_attn_qkvpacked_func")
    return lambda qkv: _first(attend(_heads(case, qkv))).reshape(qkv.shape[0], case.tokens, case.width)


def _flash_cute(case: OpCase) -> Function:
    attend = _attribute("flash_attn.cute", "flash_attn_func")
    return lambda qkv: _first(attend(*_heads(case, qkv).unbind(2))).reshape(qkv.shape[0], case.tokens, case.width)


def _xformers(case: OpCase) -> Function:
    """With its own unbind, whose backward finds the three gradients where they belong."""
    import xformers.ops

    def run(qkv: Tensor) -> Tensor:
        q, k, v = xformers.ops.unbind(_heads(case, qkv), 2)
        return xformers.ops.memory_efficient_attention(q, k, v).reshape(qkv.shape[0], case.tokens, case.width)

    return run


def _liger(case: OpCase) -> Function:
    layer_norm = _attribute("liger_kernel.transformers.functional", "liger_layer_norm")
    return lambda x, weight, bias: layer_norm(x, weight, bias, EPS)


def _apex(case: OpCase) -> Function:
    layer_norm = _attribute("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")
    return lambda x, weight, bias: layer_norm(x, weight, bias, (case.width,), EPS)


def _quack(case: OpCase) -> Function:
    """It wants rows, and weights in float32: converted once, as they would be stored."""
    layer_norm = _attribute("quack.rmsnorm", "layernorm_fwd")
    vectors = Once(lambda weight, bias: (weight.float(), bias.float()))
    return lambda x, weight, bias: layer_norm(x.view(-1, case.width), *vectors(weight, bias), EPS).view(x.shape)


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


class _Module:
    """A library's module, run with the tensors of each call in the place of its parameters."""

    def __init__(self, module: torch.nn.Module, names: Mapping[str, str]) -> None:
        self._module, self._names = module, names

    def __call__(self, x: Tensor, given: Tensors) -> Tensor:
        # where the module looks them up itself; torch.func.functional_call takes longer than many an op
        for ours, theirs in self._names.items():
            self._module._parameters[theirs] = given[ours]  # type: ignore[assignment]
        return self._module(x)


_AS_THEY_ARE = {name: name for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")}


def _transformer_engine(case: OpCase) -> Function:
    """Its modules in the case's dtype; fp8 off, as it is by default. Its "gelu" is the tanh form."""
    import transformer_engine.pytorch as te

    D, hidden, how = case.width, case.hidden, {"params_dtype": case.torch_dtype, "device": "cuda"}

    def mlp(norm: str) -> _Module:
        norms = {f"{norm}_weight": "layer_norm_weight", f"{norm}_bias": "layer_norm_bias"}
        return _Module(te.LayerNormMLP(D, hidden, eps=EPS, activation="gelu", **how), norms | _AS_THEY_ARE)

    def attention() -> Function:
        attend = te.DotProductAttention(case.heads, case.head_dim, qkv_format="bshd", attn_mask_type="no_mask")
        return lambda qkv: attend(*_heads(case, qkv).unbind(2)).view(qkv.shape[0], case.tokens, D)

    if case.op == "layer_norm":
        norm = _Module(te.LayerNorm(D, eps=EPS, **how), {"weight": "weight", "bias": "bias"})
        return lambda **given: norm(given["x"], given)
    if case.op == "attention":
        return attention()
    if case.op == "norm_mlp":
        whole = mlp("norm")
        return lambda **given: given["x"] + whole(given["x"], given)
    norms = {"norm1_weight": "layer_norm_weight", "norm1_bias": "layer_norm_bias"}
    qkv = _Module(te.LayerNormLinear(D, 3 * D, eps=EPS, **how), {**norms, "qkv_weight": "weight", "qkv_bias": "bias"})
    heads, second = attention(), mlp("norm2")
    proj = _Module(te.Linear(D, D, **how), {"proj_weight": "weight", "proj_bias": "bias"})

    def block(**given: Tensor) -> Tensor:
        x = given["x"] + proj(heads(qkv(given["x"], given)), given)
        return x + second(x, given)

    return block


_PRODUCTS = (*GROUPS["linear"], "norm_mlp", "block")

COMPILERS = (
    Peer("compile", OPS, functools.partial(_compiled, None), scope=_compiling),
    # Without CUDA graphs: they copy every input into memory of their own, which costs as much as an op of one kernel,
    # and what they save, the launches, is outside the time of a burst anyway.
    Peer(
        "compile-max-autotune",
        OPS,
        functools.partial(_compiled, "max-autotune-no-cudagraphs"),
        device="cuda",
        elsewhere="",
        scope=_compiling,
    ),
    Peer(
        "compile-max-autotune",
        OPS,
        _frozen,
        device="cpu",
        elsewhere="",
        lacks=forward_only("it takes weights for constants, which in training they are not"),
    ),
)
PEERS = (
    Peer("onednn-packed", _PRODUCTS, _packed, device="cpu", elsewhere="it runs on a CPU", lacks=forward_only(_PACKED)),
    Peer(
        "flash-attn-2",
        ("attention",),
        functools.partial(_flash_packed, "flash_attn"),
        ("flash_attn", "flash_attn_2_cuda"),
        "pip install flash-attn --no-build-isolation",
        "cuda",
        lacks=_HALF,
    ),
    Peer(
        "flash-attn-3",
        ("attention",),
        functools.partial(_flash_packed, "flash_attn_interface"),
        ("flash_attn_interface",),
        "python setup.py install  in hopper/ of github.com/Dao-AILab/flash-attention",
        "cuda",
        lacks=_HALF,
    ),
    Peer(
        "flash-attn-4",
        ("attention",),
        _flash_cute,
        ("flash_attn.cute",),
        "pip install --pre flash-attn-4",
        "cuda",
        lacks=_HALF,
    ),
    Peer("xformers", ("attention",), _xformers, ("xformers.ops",), "pip install xformers", "cuda"),
    Peer("liger", ("layer_norm",), _liger, ("liger_kernel",), "pip install liger-kernel", "cuda"),
    Peer(
        "apex",
        ("layer_norm",),
        _apex,
        ("apex", "fused_layer_norm_cuda"),
        "APEX_CUDA_EXT=1 pip install --no-build-isolation .  in github.com/NVIDIA/apex",
        "cuda",
    ),
    Peer(
        "quack",
        ("layer_norm",),
        _quack,
        ("quack.rmsnorm",),
        "pip install quack-kernels",
        "cuda",
        lacks=forward_only("its LayerNorm has no autograd"),
    ),
    Peer(
        "transformer-engine",
        ("layer_norm", "attention", "norm_mlp", "block"),
        _transformer_engine,
        ("transformer_engine.pytorch",),
        "pip install --no-build-isolation 'transformer_engine[pytorch]'",
        "cuda",
    ),
)
