"""Is it still the same model? Errors against fp64, and the rule that decides whether a speed may be shown."""

from dataclasses import dataclass

import torch

FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}  # of the largest logit
FP64_CHUNK = 8


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
