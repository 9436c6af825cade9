"""The registry: which implementation serves an op, why another one cannot, and how to choose.

Implementations are named as strings and imported on first use, so importing fastvit loads neither Triton nor the
compiled extension. An implementation is any object with ``why_not(*args)``, ``forward(*args)`` and, where it has one,
``backward(*args)``; an op whose implementation has no backward uses the reference's.
"""

import difflib
import importlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .settings import SETTINGS
from .tracing import constant

BACKENDS = ("reference", "triton", "cuda", "cpu")

# op -> backends that implement it beside the reference
OPS: dict[str, tuple[str, ...]] = {
    "patch_embed": ("triton", "cuda", "cpu"),
    "layer_norm": ("triton", "cuda", "cpu"),
    "group_norm": ("triton", "cpu"),
    "attention": ("triton", "cuda", "cpu"),
    "linear": ("triton", "cuda", "cpu"),
    "norm_mlp": ("triton", "cuda", "cpu"),
    "encoder": ("cuda", "cpu"),
}

_MODULES = {"triton": "fastvit.kernels.{op}", "cuda": "fastvit.native_cuda:cuda.{op}", "cpu": "fastvit.native:cpu.{op}"}
_WHY_UNAVAILABLE = {"triton": "fastvit.kernels._device", "cuda": "fastvit.native", "cpu": "fastvit.native"}

# What "auto" tries per device, in order, before the reference.
_AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(OPS, ("cpu",)),
    "cuda": {op: tuple(name for name in names if name != "cpu") for op, names in OPS.items()},
}

# Measurements decide what auto takes. A backend without one is passed over, aloud, until somebody demands it.
_UNMEASURED = {
    name: f"it has not been measured on a GPU yet; `with fastvit.backend({name!r}):` runs it"
    for name in ("triton", "cuda")
}

logger = logging.getLogger("fastvit")
if SETTINGS.log:
    logger.setLevel(SETTINGS.log)


class Loaded:
    """The implementations in use, as attributes called "backend_op".

    No dict: torch.compile reads one once, and misses what is loaded while it traces on.
    """


_reported: set[tuple[str, str, str]] = set()
_override = threading.local()


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run these inputs; the message says why."""


def unknown_name(kind: str, name: object, valid: Sequence[str]) -> ValueError:
    """The error for a name that does not exist: it lists the valid ones and the closest."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"fastvit: unknown {kind} {name!r}; expected one of {', '.join(valid)}.{hint}")


def _check_backend(name: object) -> str:
    if name not in (*BACKENDS, "auto"):
        raise unknown_name("backend", name, ("auto", *BACKENDS))
    return str(name)


_default = _check_backend(SETTINGS.backend)


@constant
def _load(op: str, backend: str) -> str:
    """Import an implementation into ``Loaded``; returns why it cannot be used here, or an empty string."""
    key = f"{backend}_{op}"
    if hasattr(Loaded, key):
        return ""
    reason = why_unavailable(backend)
    if reason is not None:
        return reason
    module_name, _, attribute = _MODULES[backend].format(op=op).partition(":")
    implementation: Any = importlib.import_module(module_name)
    for part in filter(None, attribute.split(".")):
        implementation = getattr(implementation, part)
    setattr(Loaded, key, implementation)
    return ""


def implementation(op: str, backend: str) -> Any:
    """The object that serves ``op`` on ``backend``: ``why_not``, ``forward`` and perhaps ``backward``."""
    failure = _load(op, backend)
    if failure:
        raise BackendError(f"fastvit.{op}: {failure}")
    return getattr(Loaded, f"{backend}_{op}")


def why_not(op: str, args: Sequence[Any], backend: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on these launcher arguments, in one sentence, or None when it can."""
    if backend == "reference":
        return None
    if backend not in OPS[op]:
        return f"{backend} has no {op} kernel"
    failure = _load(op, backend)
    if failure:
        return failure
    return getattr(Loaded, f"{backend}_{op}").why_not(*args)


def requested() -> str:
    """The backend in force for this thread: the innermost ``with backend(...)``, else FASTVIT_BACKEND, else auto.

    While torch.onnx exports it is the reference, whatever was asked for: ONNX has no name for a kernel of ours.
    """
    if _in_onnx_export():
        return "reference"
    return getattr(_override, "name", _default)


@constant
def _in_onnx_export() -> bool:
    # in every call of an op: the first two questions cost a tenth of the third
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def select(op: str, *args: Any) -> str:
    """The backend that will run ``op`` on these launcher arguments (the first one is the tensor that names the device).

    Raises:
        BackendError: an explicitly requested backend cannot run them, or FASTVIT_STRICT forbids the fallback.
    """
    name = requested()
    if SETTINGS.disable:
        return "reference"
    if name != "auto":
        reason = why_not(op, args, name)
        if reason is not None:
            raise BackendError(f"fastvit.{op}: backend {name!r} was requested but {reason}")
        return name
    for candidate in _AUTO.get(args[0].device.type, {}).get(op, ()):
        reason = _UNMEASURED.get(candidate) or why_not(op, args, candidate)
        if reason is None:
            return candidate
        _fall_back(op, candidate, reason)
    return "reference"


def serving(op: str, *args: Any) -> str | None:
    """The backend that :func:`select` would name, or None where it would fall back or raise; nothing is reported.

    An op asks this to compute an option that no kernel here fuses beside the kernel, instead of giving up the kernel.
    """
    name = requested()
    if SETTINGS.disable or name == "reference":
        return "reference"
    candidates = _AUTO.get(args[0].device.type, {}).get(op, ()) if name == "auto" else (name,)
    passed_over = _UNMEASURED if name == "auto" else {}
    return next((c for c in candidates if c not in passed_over and why_not(op, args, c) is None), None)


def _fall_back(op: str, backend: str, reason: str) -> None:
    if SETTINGS.strict:
        raise BackendError(f"fastvit.{op}: {backend} is skipped because {reason} (FASTVIT_STRICT is set)")
    if torch.compiler.is_compiling():
        return
    cause = (op, backend, reason)
    if cause not in _reported:
        _reported.add(cause)
        logger.warning("fastvit.%s: %s is skipped because %s", op, backend, reason)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops of this thread on one backend: ``with fastvit.backend("triton"): model(x)``.

    Args:
        name: "auto", "reference", "triton", "cuda" or "cpu". Anything but "auto" is a demand: an op that cannot run
            there raises :class:`BackendError` with the reason instead of falling back.

    Raises:
        ValueError: the name is none of these.
    """
    _check_backend(name)
    before = getattr(_override, "name", None)
    _override.name = name
    try:
        yield
    finally:
        if before is None:
            del _override.name
        else:
            _override.name = before


def why_unavailable(name: str) -> str | None:
    """Why a whole backend cannot be used on this machine, in one sentence, or None when it can."""
    if _check_backend(name) in ("auto", "reference"):
        return None
    try:
        module = importlib.import_module(_WHY_UNAVAILABLE[name])
    except ImportError as error:
        return f"{name} cannot be imported: {error}"
    return module.why_unavailable(name if name != "triton" else "cuda" if torch.cuda.is_available() else "cpu")


def is_available(name: str) -> bool:
    """Whether a backend can be used on this machine at all."""
    return why_unavailable(name) is None
