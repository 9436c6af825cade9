"""int8 inference on a CPU, by request only: which linear layers, what each costs in accuracy, and the way back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, prepack
from .fused import INT8, LINEARS, is_fused_block
from .parts import linear_places
from .release import check_exact, release

_NOISE_IMAGES = 2


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer: its name, the relative error of the output when it alone is int8, and whether it is now."""

    name: str
    error: float
    int8: bool

    def __str__(self) -> str:
        return f"{self.name:<28} {self.error:8.4f}  {'int8' if self.int8 else 'bfloat16'}"


class QuantizationReport(list[QuantizedLayer]):
    """The layers of a model that :func:`quantize` looked at; prints as a table.

    error: relative error ‖y' - y‖ / ‖y‖ of the output on the calibration images, with all that are int8 now.
    """

    error: float = 0.0

    def __str__(self) -> str:
        kept = sum(not layer.int8 for layer in self)
        total = f"{len(self) - kept} layers in int8, {kept} in bfloat16: relative error of the output {self.error:.4f}"
        return "\n".join([f"{'layer':<28} {'alone':>8}  computed in", *map(str, self), total])


def quantize(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | None = None,
    *,
    threshold: float = 0.01,
    release_original: bool = False,
) -> QuantizationReport:
    """Compute the linear layers of an accelerated Vision Transformer's blocks in int8 at inference on a CPU.

    Weights are rounded to signed bytes, with a step for each output channel; activations to unsigned bytes with a range
    of their own for each token, found on the way. Sums are exact; norms, attention and the sums over blocks stay in
    bfloat16 and float32. Where a gradient is asked for, the model computes what it did before. Parameters
    and state_dict stay; :func:`fastvit.restore` undoes it, and calling this again chooses anew.

    Args:
        model: a model that :func:`fastvit.accelerate` has been called on, or a ``fastvit.VisionTransformer``.
        calibration: images (B, C, height, width) as the model takes them, or batches of them, on which the error of
            each layer is measured; None takes two images of noise.
        threshold: a layer whose relative error alone is above it stays in bfloat16; 0 keeps all of them, ``inf`` none.
        release_original: keep of these layers' weights what is computed with alone, int8 or bfloat16. The originals
            are gone then: state_dict and restore raise RuntimeError until load_state_dict has brought them back. A
            model that was accelerated with ``release_original=True`` keeps them, packed, without this.

    Returns:
        What each layer costs and which were chosen.

    Raises:
        TypeError: not a module, or calibration that is no tensor. ValueError: no block to quantise, a model that is not
            on a CPU, a negative threshold, no images. RuntimeError: the CPU kernels are absent, or the originals are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastvit.quantize: model must be a torch.nn.Module, got {type(model).__name__}")
    if not threshold >= 0:
        raise ValueError(f"fastvit.quantize: threshold must be a number >= 0, got {threshold!r}")
    reason = backends.why_unavailable("cpu")
    if reason is not None:
        raise RuntimeError(f"fastvit.quantize: the cpu kernels are needed, but {reason}")
    blocks = {name: m for name, m in model.named_modules() if is_fused_block(m)}
    if not blocks:
        raise ValueError(
            f"fastvit.quantize: {type(model).__name__} has no block that the CPU's encoder kernel runs; call "
            "fastvit.accelerate first, and see fastvit.report(model): blocks whose positions turn queries, or shift "
            "the scores, cannot be"
        )
    devices = {p.device.type for block in blocks.values() for p in block.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"fastvit.quantize: the model must be on the CPU, got {', '.join(sorted(devices))}")
    check_exact("quantize", model)
    batches = list(_batches(model, calibration))
    with _inference(model):
        report = _choose(model, blocks, batches, threshold)
    prepack.forget(model.parameters())  # of all that was tried
    if release_original:
        release(model, rounded=True)
    return report


def _choose(
    model: nn.Module, blocks: dict[str, nn.Module], batches: list[Tensor], threshold: float
) -> QuantizationReport:
    for block in blocks.values():
        block.__dict__.pop(INT8, None)
    exact = _outputs(model, batches)
    size = exact.norm().clamp_min(1e-30)
    for block in blocks.values():
        block.__dict__[INT8] = (False,) * LINEARS
    base = _outputs(model, batches)
    report = QuantizationReport()
    layers = {name: ["+".join(place.layer for place in its) for its in linear_places(b)] for name, b in blocks.items()}
    for (name, block), i in product(blocks.items(), range(LINEARS)):
        block.__dict__[INT8] = tuple(j == i for j in range(LINEARS))
        error = float((_outputs(model, batches) - base).norm() / size)
        block.__dict__[INT8] = (False,) * LINEARS
        report.append(QuantizedLayer(f"{name}.{layers[name][i]}", error, error <= threshold))
    for number, block in enumerate(blocks.values()):
        chosen = report[number * LINEARS : (number + 1) * LINEARS]
        block.__dict__[INT8] = tuple(layer.int8 for layer in chosen)
    report.error = float((_outputs(model, batches) - exact).norm() / size)
    return report


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients and on the CPU kernels; each module's mode returns afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), backends.backend("auto"):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _outputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([_first(model(batch)).double().flatten(1) for batch in batches])


def _first(output: Any) -> Tensor:
    """The output, or the first tensor of several, such as the logits in an output of transformers."""
    several = output.values() if isinstance(output, dict) else output
    return output if isinstance(output, Tensor) else next(y for y in several if isinstance(y, Tensor))


def _batches(model: Any, calibration: Tensor | Iterable[Tensor] | None) -> Iterator[Tensor]:
    if calibration is None:
        embed = next((m for m in model.modules() if hasattr(m, "proj") and getattr(m, "img_size", None)), None)
        if embed is None:
            raise ValueError(f"fastvit.quantize: {type(model).__name__} does not say its image size; pass calibration")
        weight = embed.proj.weight
        channels = embed.in_chans if hasattr(embed, "backbone") else weight.shape[1]
        noise = torch.randn(_NOISE_IMAGES, channels, *embed.img_size, generator=torch.Generator().manual_seed(0))
        yield noise.to(weight.dtype)
        return
    found = 0
    for batch in (calibration,) if isinstance(calibration, Tensor) else calibration:
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            given = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"fastvit.quantize: calibration must be images (B, C, height, width), got {given}")
        found += len(batch)
        yield batch
    if not found:
        raise ValueError("fastvit.quantize: calibration holds no images")
