"""How well a model classifies: top-1, top-5 and the mean cross-entropy over a set of images."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .error import TrainingError

if TYPE_CHECKING:
    from fastvit.data import Source


@dataclass(frozen=True)
class Evaluation:
    """Of ``images`` images: mean cross-entropy in nats, shares whose label comes first and among the first five."""

    images: int
    loss: float
    top1: float
    top5: float


def evaluate(
    model: Callable[[Tensor], Tensor],
    source: "Source | str",
    *,
    split: str = "test",
    size: tuple[int, int] | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    dtype: str = "float32",
    device: torch.device | None = None,
    show: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a classifier of uint8 images, in eval mode and without gradients; its mode of before returns.

    Args:
        model: (B, C, height, width) uint8 to logits (B, K), e.g. a :class:`fastvit.VisionTransformer`.
        source: labelled images, or a place as in :func:`fastvit.data.open_source`.
        split: of a place.
        size: (height, width) of the images; None: what the model's config says.
        workers: processes that decode, as in :class:`fastvit.data.Batches`.
        dtype: "bfloat16" by autocast.
        device: where the model wants its images; None: where its parameters are.
        show: called with how many of how many batches are done.

    Raises:
        TrainingError: no images, or the model has fewer classes than the images. DataError: what cannot be read.
    """
    from fastvit.data import Augmentation, Batches, open_source

    opened = open_source(source, split) if isinstance(source, str) else source
    batches = Batches(
        opened, batch_size, size=size or size_of(model), train=False, augmentation=Augmentation(), workers=workers
    )
    counted = _counted(batches.epoch(0), batches.steps, show)
    return measured(model, counted, autocast_of(model, dtype), device or device_of(model))


def measured(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Evaluation:
    """:func:`evaluate` over batches; ``total`` adds up sums over processes."""
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    training = getattr(model, "training", False)
    if isinstance(model, torch.nn.Module):
        model.eval()
    try:
        with torch.no_grad(), autocast():
            for images, labels in batches:
                labels = labels.to(device)
                logits = model(images.to(device)).float()
                if logits.dim() != 2:
                    raise TrainingError(f"fastvit: the model must give logits (B, K), got {tuple(logits.shape)}")
                classes = logits.shape[1]
                if labels.numel() and int(labels.max()) >= classes:
                    raise TrainingError(f"fastvit: label {int(labels.max())}, but the model has {classes} classes")
                best = logits.topk(min(5, classes), 1).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                each = (torch.tensor(len(labels)), loss, best[:, 0].sum(), best.sum())
                sums += torch.stack([value.to(sums) for value in each])
    finally:
        if isinstance(model, torch.nn.Module):
            model.train(training)
    images, loss, first, five = total(sums).tolist()
    if not images:
        raise TrainingError("fastvit: there are no images to evaluate")
    return Evaluation(int(images), loss / images, first / images, five / images)


def _counted(
    batches: Iterable[tuple[Tensor, Tensor]], steps: int, show: Callable[[int, int], None] | None
) -> Iterable[tuple[Tensor, Tensor]]:
    for done, batch in enumerate(batches):
        yield batch
        if show is not None:
            show(done + 1, steps)


def size_of(model: Any) -> tuple[int, int]:
    """(height, width) of the images that a model takes.

    Raises:
        TrainingError: it does not say.
    """
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is None:
        raise TrainingError(f"fastvit: {type(model).__name__} does not say its images' size: give size=(height, width)")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def device_of(model: Any) -> torch.device:
    """Where a model's parameters lie."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


def autocast_of(model: Any, dtype: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context for forward passes in "float32" or, by autocast, "bfloat16"."""
    kind = device_of(model).type
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16")
