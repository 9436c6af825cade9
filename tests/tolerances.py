"""The tolerance rule: a result may differ from fp64 mathematics by a small multiple of what eager PyTorch does.

``exact`` is the mathematics in fp64 on the same rounded inputs, ``eager`` PyTorch's own result in the dtype under test.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Bounds in multiples of eager's error: the largest element's (plus ``slack``), and the relative L2 norm's."""

    largest: float
    norm: float
    slack: float
    cosine: float | None = None


LOW_FORWARD = Rule(largest=2.0, norm=1.5, slack=1e-5)
LOW_GRADIENT = Rule(largest=3.0, norm=2.0, slack=1e-4, cosine=0.9999)
FP32 = Rule(largest=4.0, norm=4.0, slack=1e-6)
FP64 = Rule(largest=4.0, norm=4.0, slack=1e-12)


def rule(dtype: torch.dtype, gradient: bool) -> Rule:
    if dtype == torch.float64:
        return FP64
    if dtype == torch.float32:
        return FP32
    return LOW_GRADIENT if gradient else LOW_FORWARD


def compare(actual: Tensor, exact: Tensor, eager: Tensor, gradient: bool = False) -> str | None:
    """What is wrong with ``actual`` by the rule of its dtype, or None.

    The slack is absolute for fp16 / bf16 forwards and scales with the largest exact value elsewhere.
    """
    if actual.dtype != eager.dtype or actual.shape != exact.shape:
        return f"dtype and shape {actual.dtype} {tuple(actual.shape)}, expected {eager.dtype} {tuple(exact.shape)}"
    bounds = rule(actual.dtype, gradient)
    got, want, base = (t.detach().cpu().double() for t in (actual, exact, eager))
    if not torch.equal(got.isnan(), want.isnan()):
        return f"NaN in {int((got.isnan() != want.isnan()).sum())} wrong places"
    infinite = base.isinf() | want.isinf()
    if not torch.equal(got[infinite], base[infinite]) or bool((got.isinf() & ~infinite).any()):
        return "infinities in other places than eager's"
    finite = ~infinite & ~want.isnan()
    got, want, base = got[finite], want[finite], base[finite]
    if got.numel() == 0:
        return None
    error, yardstick = (got - want).abs(), (base - want).abs()
    scale = max(1.0, want.abs().max().item()) if bounds is not LOW_FORWARD else 1.0
    limit = bounds.largest * yardstick.max().item() + bounds.slack * scale
    if not error.max().item() <= limit:
        return f"largest error {error.max():.3e} > {limit:.3e} ({bounds.largest} x eager's {yardstick.max():.3e})"
    size = want.norm().item()
    norm_limit = bounds.norm * yardstick.norm().item() + bounds.slack * scale * want.numel() ** 0.5
    if not error.norm().item() <= norm_limit:
        return f"L2 error {error.norm():.3e} > {norm_limit:.3e} ({bounds.norm} x eager's {yardstick.norm():.3e})"
    if bounds.cosine is not None and size > 0:
        cosine = torch.dot(got, want).item() / max(got.norm().item() * size, 1e-300)
        eager_cosine = torch.dot(base, want).item() / max(base.norm().item() * size, 1e-300)
        if not cosine >= min(bounds.cosine, eager_cosine - 1e-4):
            return f"cosine {cosine:.6f} < {bounds.cosine}"
    return None


def assert_close(name: str, actual: Tensor, exact: Tensor, eager: Tensor, gradient: bool = False) -> None:
    """Fail with the reason unless ``actual`` keeps the rule of its dtype."""
    reason = compare(actual, exact, eager, gradient)
    assert reason is None, f"{name}: {reason}"
