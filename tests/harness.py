"""Runs an op beside the same mathematics in fp64 and in eager PyTorch, and compares outputs and every gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

import fastvit
from fastvit import backends


@dataclass(frozen=True)
class Place:
    """A backend and the device its tensors live on here."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


# The CUDA kernels that compute in 16 bits alone have tests of their own: test_cuda_<op>.py.
LOW_ONLY = {("attention", "cuda"), ("encoder", "cuda")}


def places(op: str) -> list:
    """Every backend of an op, on the devices it serves here; an absent one is skipped with its reason."""
    gpu = torch.cuda.is_available()
    wanted = [Place("reference", "cpu")]
    for name in backends.OPS[op]:
        if (op, name) in LOW_ONLY:
            continue
        wanted.append(Place(name, "cuda" if name == "cuda" or (name == "triton" and gpu) else "cpu"))
    if gpu:
        wanted.append(Place("reference", "cuda"))
    return [pytest.param(place, id=str(place), marks=_absent(place)) for place in wanted]


def _absent(place: Place) -> list:
    if place.device == "cuda" and not torch.cuda.is_available():
        return [pytest.mark.skip(reason="GPU: this machine has none")]
    reason = backends.why_unavailable(place.backend)
    return [pytest.mark.skip(reason=reason)] if reason else []


def dtypes_of(place: Place) -> tuple[torch.dtype, ...]:
    low = (torch.float32, torch.float16, torch.bfloat16)
    return (torch.float64, *low) if place.backend in ("reference", "cpu") else low


Tensors = dict[str, Tensor]


def random_like(output: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What may come after an op; the gradient each sends back lies in memory in a way of its own.
FOLLOWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(),  # every stride 0
    "mean over tokens": lambda y: y.mean(1),
    "first token": lambda y: y[:, 0],
    "cat": lambda y: torch.cat([y, y], -1),
    "cat, one element off": lambda y: torch.cat([y[..., :1].detach(), y], -1),
    "transpose": lambda y: y.transpose(0, 1),
    "turned": lambda y: y.transpose(-1, -2),
    "stack": lambda y: torch.stack([y, y], -1),  # every second element
    "chunk": lambda y: y.tensor_split(2, -1)[-1],
    "expand": lambda y: y.expand(2, *y.shape),
}


def upstreams(output: Tensor) -> dict[str, Tensor]:
    """Incoming gradients for an output of two dimensions or more, as autograd hands them over, by what made them."""
    leaf = output.detach().requires_grad_()
    made = {}
    for name, follow in FOLLOWERS.items():
        after = follow(leaf)
        (made[name],) = torch.autograd.grad(after, leaf, random_like(after).to(after.dtype).to(after.device))
    return made


def check_upstreams(
    place: Place,
    dtype: torch.dtype,
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Tensors,
    fixed: Tensors | None = None,
    exact: bool = True,
) -> None:
    """Every gradient of op is the same whichever way the incoming gradient lies in memory.

    Args:
        exact: to the bit. torch's matrix products round an unaligned operand otherwise, so that a backward made of
            them (of the reference, or of a backend that borrows it) is held to 1e-5 of the largest element instead, or
            to two units in its last place.
    """
    leaves = {k: t.to(place.device, dtype, copy=True).requires_grad_() for k, t in tensors.items() if t is not None}
    rest = {k: t for k, t in tensors.items() if t is None}
    with fastvit.backend(place.backend):
        outputs = op(**leaves, **rest, **{k: t.to(place.device) for k, t in (fixed or {}).items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for name in FOLLOWERS:
            odd = [upstreams(output)[name] for output in outputs]
            plain = [dy.clone(memory_format=torch.contiguous_format) for dy in odd]
            want, got = (torch.autograd.grad(outputs, [*leaves.values()], dy, retain_graph=True) for dy in (plain, odd))
            for leaf, w, g in zip(leaves, want, got, strict=True):
                missed = 0.0 if torch.equal(g, w) else ((g - w).abs().max() / w.abs().max()).item()
                bound = 0.0 if exact else max(1e-5, 2 * torch.finfo(g.dtype).eps)
                assert missed <= bound, f"dy of {name}: gradient of {leaf} is {missed:.1e} off"


def _run(function: Callable[..., Tensor | tuple[Tensor, ...]], tensors: Tensors, wanted: list[str], seed: int):
    leaves = {k: t.detach().clone().requires_grad_(k in wanted) if t is not None else None for k, t in tensors.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not wanted:
        return outputs, {}
    upstream = [random_like(o, seed + i).to(o.dtype).to(o.device) for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, [leaves[k] for k in wanted], upstream, allow_unused=True)
    return outputs, dict(zip(wanted, grads, strict=True))


def check(
    place: Place,
    dtype: torch.dtype,
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    eager: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Tensors,
    fixed: Tensors | None = None,
    gradients: bool = True,
) -> None:
    """Compare op (on ``place``, in ``dtype``) with eager (same dtype) and eager in fp64, by the tolerance rule.

    Args:
        op, eager: functions of the keyword tensors; eager is plain PyTorch, written in the test.
        tensors: fp64 inputs, differentiated; None entries are passed through.
        fixed: inputs passed as they are (masks, uint8 images).
    """
    fixed = fixed or {}
    wanted = [k for k, t in tensors.items() if t is not None] if gradients else []
    rounded = {k: None if t is None else t.to(dtype) for k, t in tensors.items()}
    exact = {k: None if t is None else t.double() for k, t in rounded.items()}
    there = {k: None if t is None else t.to(place.device) for k, t in rounded.items()}
    fixed_there = {k: t.to(place.device) for k, t in fixed.items()}
    want, want_grads = _run(lambda **kw: eager(**kw, **fixed), exact, wanted, 1)
    base, base_grads = _run(lambda **kw: eager(**kw, **fixed), rounded, wanted, 1)
    with fastvit.backend(place.backend):
        got, got_grads = _run(lambda **kw: op(**kw, **fixed_there), there, wanted, 1)
    assert len(got) == len(want)
    for i, (g, w, b) in enumerate(zip(got, want, base, strict=True)):
        assert_close(f"output {i}", g, w, b)
    for name in wanted:
        assert_close(f"gradient of {name}", got_grads[name], want_grads[name], base_grads[name], gradient=True)
