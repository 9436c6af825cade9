"""Is it still the same model? Errors against fp64, and the rule that decides whether a speed may be shown."""

import math
from dataclasses import dataclass

import torch

FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # of the largest logit
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
    """max_error: largest |logit - fp64 logit|; top1: share of images whose largest logit is fp64's largest."""

    max_error: float
    top1: float
    finite: bool


@torch.inference_mode()
def exact_logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of an fp64 model for images (B, C, height, width) of any dtype: fp64 (B, K), in small chunks."""
    return torch.cat([model(chunk.double()) for chunk in images.split(FP64_CHUNK)])


def compare(logits: torch.Tensor, exact: torch.Tensor) -> Accuracy:
    """Compare logits (B, K) with the fp64 logits (B, K) of the same weights and images.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != exact.shape:
        raise ValueError(f"compare: logits have shape {tuple(logits.shape)}, expected {tuple(exact.shape)}")
    difference = (logits.double() - exact).abs()
    finite = bool(difference.isfinite().all())
    agreement = (logits.argmax(-1) == exact.argmax(-1)).double().mean()
    return Accuracy(float(difference.max()) if finite else float("nan"), float(agreement), finite)


def why_red(dtype: torch.dtype, got: Accuracy, eager: Accuracy, largest_logit: float) -> str | None:
    """Why these logits break the whole-model rule, or None: error <= factor x eager's own error in the same dtype."""
    if not eager.finite:
        return "eager itself gives NaN or infinity, so there is nothing to compare with"
    if not got.finite:
        return "NaN or infinity in the logits"
    bound = FACTOR[dtype] * eager.max_error + ATOL[dtype] * largest_logit
    if got.max_error <= bound:
        return None
    return (
        f"max error {got.max_error:.2e} is above the bound {bound:.2e} "
        f"({FACTOR[dtype]:g} x eager's {eager.max_error:.2e})"
    )


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
