"""Is it still the same model? Errors against fp64, and the rule that decides whether a speed may be shown."""

import math
from dataclasses import dataclass

import torch

FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # of the largest logit
INT8_RELATIVE = 5e-2  # of the logits' norm, which eager's float32 is no yardstick for
GRADIENT_FACTOR, GRADIENT_ATOL = 2.0, 1e-6  # relative L2 of all gradients as one vector
FP64_CHUNK = 8


@dataclass(frozen=True)
class Bounds:
    """What one op's tensor may differ from fp64, in multiples of eager's error: CONTRIBUTING.md, the tolerance rule."""

    largest: float
    norm: float
    slack: float
    cosine: float | None = None


LOW_FORWARD = Bounds(2.0, 1.5, 1e-5)
LOW_GRADIENT = Bounds(3.0, 2.0, 1e-4, 0.9999)
FULL = Bounds(4.0, 4.0, 1e-6)


@dataclass(frozen=True)
class Accuracy:
    """max_error: largest |y - y64|, of logits or of gradients; relative: ‖y - y64‖ / ‖y64‖.

    top1: share of images whose largest logit is fp64's largest; None of gradients.
    """

    max_error: float
    relative: float
    top1: float | None
    finite: bool


@torch.inference_mode()
def exact_logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of an fp64 model for images (B, C, height, width) of any dtype: fp64 (B, K), in small chunks."""
    return torch.cat([model(chunk.double()) for chunk in images.split(FP64_CHUNK)])


def compare(logits: torch.Tensor, exact: torch.Tensor) -> Accuracy:
    """Compare logits (B, K), or a gradient vector, with fp64's of the same weights and images.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != exact.shape:
        raise ValueError(f"compare: logits have shape {tuple(logits.shape)}, expected {tuple(exact.shape)}")
    difference = logits.double() - exact
    finite = bool(difference.isfinite().all())
    largest, relative = (
        (float(difference.abs().max()), float(difference.norm() / exact.norm())) if finite else (math.nan, math.nan)
    )
    top1 = float((logits.argmax(-1) == exact.argmax(-1)).double().mean()) if exact.ndim > 1 else None
    return Accuracy(largest, relative, top1, finite)


def why_red(dtype: torch.dtype, got: Accuracy, eager: Accuracy, largest_logit: float) -> str | None:
    """Why these logits break the whole-model rule, or None: error <= factor x eager's own error in the same dtype.

    In int8, which eager has not, the relative error is at most `INT8_RELATIVE`.
    """
    if (reason := _why_not_finite(got, eager)) is not None:
        return reason
    if dtype == torch.int8:
        return _above("relative error", got.relative, INT8_RELATIVE, "int8's")
    bound = FACTOR[dtype] * eager.max_error + ATOL[dtype] * largest_logit
    return _above("max error", got.max_error, bound, f"{FACTOR[dtype]:g} x eager's {eager.max_error:.2e}")


def why_red_gradient(got: Accuracy, eager: Accuracy) -> str | None:
    """Why these gradients break the rule of a training step, or None: relative L2 error <= 2 x eager's own + 1e-6."""
    if (reason := _why_not_finite(got, eager)) is not None:
        return reason
    bound = GRADIENT_FACTOR * eager.relative + GRADIENT_ATOL
    return _above("relative error", got.relative, bound, f"{GRADIENT_FACTOR:g} x eager's {eager.relative:.2e}")


def _why_not_finite(got: Accuracy, eager: Accuracy) -> str | None:
    if not eager.finite:
        return "eager itself gives NaN or infinity, so there is nothing to compare with"
    return None if got.finite else "NaN or infinity in the result"


def _above(what: str, error: float, bound: float, origin: str) -> str | None:
    return None if error <= bound else f"{what} {error:.2e} is above the bound {bound:.2e} ({origin})"


def judge(
    got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, gradient: bool
) -> tuple[float, float, str | None]:
    """Hold one output, or one gradient, of an op to the tolerance rule of its dtype, on its device.

    Returns:
        (largest error against the fp64 tensor, the same in units of eager's own, None or why the rule is broken).
    """
    if got.dtype != eager.dtype or got.shape != exact.shape:
        expected = f"{eager.dtype} {tuple(exact.shape)}"
        return math.nan, math.nan, f"{got.dtype} {tuple(got.shape)}, expected {expected}"
    bounds = FULL if got.dtype == torch.float32 else LOW_GRADIENT if gradient else LOW_FORWARD
    got, eager = got.double(), eager.double()
    if not bool(eager.isfinite().all() & exact.isfinite().all()):
        return math.nan, math.nan, "eager itself gives NaN or infinity, so there is nothing to compare with"
    if not bool(got.isfinite().all()):
        return math.nan, math.nan, "NaN or infinity"
    if got.numel() == 0:
        return 0.0, 0.0, None
    error, own = (float((tensor - exact).abs().max()) for tensor in (got, eager))
    error_norm, own_norm = (float((tensor - exact).norm()) for tensor in (got, eager))
    slack = bounds.slack * (1.0 if bounds is LOW_FORWARD else max(1.0, float(exact.abs().max())))
    ratio = error / own if own > 0 else math.inf if error > 0 else 0.0
    limits = bounds.largest * own + slack, bounds.norm * own_norm + slack * exact.numel() ** 0.5
    if error > limits[0]:
        return error, ratio, f"max error {error:.2e} is above {limits[0]:.2e} ({bounds.largest:g} x eager's {own:.2e})"
    if error_norm > limits[1]:
        return error, ratio, f"L2 error {error_norm:.2e} is above {limits[1]:.2e} ({bounds.norm:g} x {own_norm:.2e})"
    if bounds.cosine is not None and _cosine(got, exact) < min(bounds.cosine, _cosine(eager, exact) - 1e-4):
        return error, ratio, f"cosine {_cosine(got, exact):.6f} is below {bounds.cosine}"
    return error, ratio, None


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum()) / max(float(a.norm()) * float(b.norm()), 1e-300)
