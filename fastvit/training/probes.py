"""How good a frozen model's features are: the paper's few-shot least squares and a linear probe."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .error import TrainingError
from .evaluation import Evaluation, autocast_of, device_of, size_of

if TYPE_CHECKING:
    from fastvit.data import Source


@dataclass(frozen=True)
class Affine:
    """x W + b on standardised features: (x - mean) / std first; fp64."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Features (n, D) to scores (n, K)."""
        return ((x.double() - self.mean) / self.std) @ self.weight + self.bias


def features(
    model: nn.Module,
    source: "Source",
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    dtype: str = "float32",
) -> tuple[Tensor, Tensor]:
    """What a frozen model gives its head for each image: (n, D) fp32 and labels (n,), on the CPU.

    Raises:
        TrainingError: a model without timm's ``forward_features`` and ``forward_head``.
    """
    from fastvit.data import Augmentation, Batches

    network: Any = model
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise TrainingError(f"fastvit: {type(model).__name__} has no forward_features and forward_head to probe")
    batches = Batches(
        source, batch_size, size=size or size_of(model), train=False, augmentation=Augmentation(), workers=workers
    )
    device, autocast, training = device_of(model), autocast_of(model, dtype), model.training
    model.eval()
    found: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        with torch.no_grad(), autocast():
            for images, its in batches.epoch(0):
                tokens = network.forward_features(images.to(device))
                found.append(network.forward_head(tokens, pre_logits=True).float().cpu())
                labels.append(its)
    finally:
        model.train(training)
    return torch.cat(found), torch.cat(labels)


def ridge(x: Tensor, labels: Tensor, classes: int, l2: float = 0.1) -> Affine:
    """The paper's few-shot classifier in closed form: regularised least squares to targets in {-1, 1}^K (section 4.1).

    With standardised features X (n, D) and targets Y (n, K), 1 at the label and -1 elsewhere, the W and b that minimise

        |X W + b - Y|² + λ n |W|²,    W = (XᵀX + λ n I)⁻¹ Xᵀ (Y - mean(Y)),    b = mean(Y)

    Args:
        x: (n, D). labels: (n,) in 0 .. K - 1.
        l2: λ > 0.

    Raises:
        ValueError: λ out of range, or features that are no numbers.
    """
    _check(l2)
    standard, mean, std = _standardised(x)
    targets = torch.full((len(x), classes), -1.0, dtype=torch.float64)
    targets[torch.arange(len(x)), labels] = 1.0
    bias = targets.mean(0)
    gram = standard.T @ standard
    gram.diagonal().add_(l2 * len(x))
    weight = torch.cholesky_solve(standard.T @ (targets - bias), torch.linalg.cholesky(gram))
    return Affine(mean, std, weight, bias)


def logistic(x: Tensor, labels: Tensor, classes: int, l2: float = 1e-3, iterations: int = 200) -> Affine:
    """A linear layer on frozen features by multinomial logistic regression, by L-BFGS from zero, in fp64.

    Minimises  mean cross-entropy(X W + b, labels) + λ / 2 |W|²  over standardised features, a convex problem: neither
    rate nor seed matters.

    Args:
        x: (n, D). labels: (n,) in 0 .. K - 1.
        l2: λ > 0.

    Raises:
        ValueError: λ out of range, or features that are no numbers.
    """
    _check(l2)
    standard, mean, std = _standardised(x)
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Any:
        solver.zero_grad()
        value = F.cross_entropy(standard @ weight + bias, labels) + 0.5 * l2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return Affine(mean, std, weight.detach(), bias.detach())


def few_shot(
    model: nn.Module,
    train: "Source | str",
    test: "Source | str",
    *,
    shots: int = 5,
    l2: float = 0.1,
    seed: int = 0,
    batch_size: int = 128,
    workers: int | None = None,
) -> Evaluation:
    """Few-shot accuracy: :func:`ridge` on the features of ``shots`` random images of each class, on the test images.

    Args:
        train, test: images, or places of which the train and the test split is taken.
        seed: which images are taken.

    Raises:
        ValueError: an argument out of range. TrainingError: a class with fewer images than shots.
    """
    if not isinstance(shots, int) or shots < 1:
        raise ValueError(f"fastvit: shots must be an integer >= 1, got {shots!r}")
    source, tested = _opened(train, test)
    chosen = _few(source, shots, seed)
    x, labels = features(model, chosen, batch_size=batch_size, workers=workers)
    return _scored(ridge(x, labels, len(source.classes), l2), model, tested, batch_size, workers)


def linear_probe(
    model: nn.Module,
    train: "Source | str",
    test: "Source | str",
    *,
    l2: float = 1e-3,
    batch_size: int = 128,
    workers: int | None = None,
) -> Evaluation:
    """Accuracy of a linear layer trained on a frozen model's features: :func:`logistic` on all images.

    Args:
        train, test: images, or places of which the train and the test split is taken.

    Raises:
        ValueError: an argument out of range. TrainingError: a model without features.
    """
    source, tested = _opened(train, test)
    x, labels = features(model, source, batch_size=batch_size, workers=workers)
    return _scored(logistic(x, labels, len(source.classes), l2), model, tested, batch_size, workers)


def _check(l2: float) -> None:
    if not l2 > 0:
        raise ValueError(f"fastvit: l2 must be positive, got {l2!r}")


def _standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features with mean 0 and variance 1, and the mean and spread they had; a feature without spread becomes 0."""
    wide = x.double()
    if not bool(wide.isfinite().all()):
        raise ValueError("fastvit: the model's features are not all finite numbers")
    mean, std = wide.mean(0), wide.std(0, correction=0)
    std = torch.where(std > 1e-12, std, torch.inf)
    return (wide - mean) / std, mean, std


def _opened(train: "Source | str", test: "Source | str") -> "tuple[Source, Source]":
    from fastvit.data import open_source

    source = open_source(train, "train") if isinstance(train, str) else train
    tested = open_source(test, "test") if isinstance(test, str) else test
    if list(source.classes) != list(tested.classes):
        raise TrainingError("fastvit: images to fit and images to test must have the same classes in the same order")
    return source, tested


class Chosen:
    """Some images of a source, by their numbers."""

    def __init__(self, source: "Source", numbers: list[int]) -> None:
        self.source, self.numbers = source, numbers
        self.name, self.classes = source.name, source.classes

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[self.numbers[index]]


def _few(source: "Source", shots: int, seed: int) -> Chosen:
    """The first ``shots`` of every class in a random order; no more images are decoded than that takes."""
    missing = dict.fromkeys(range(len(source.classes)), shots)
    known: Any = getattr(source, "labels", None)
    numbers = []
    for number in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist():
        label = int(known[number]) if known is not None else source[number][1]
        if missing.get(label):
            missing[label] -= 1
            numbers.append(number)
            if not any(missing.values()):
                break
    for label, lacking in missing.items():
        if lacking:
            raise TrainingError(f"fastvit: {shots} shots, but {source.classes[label]!r} has {shots - lacking} images")
    return Chosen(source, numbers)


def _scored(layer: Affine, model: nn.Module, tested: "Source", batch_size: int, workers: int | None) -> Evaluation:
    x, labels = features(model, tested, batch_size=batch_size, workers=workers)
    scores = layer(x)
    best = scores.topk(min(5, scores.shape[1]), 1).indices == labels[:, None]
    loss = F.cross_entropy(scores, labels).item()
    return Evaluation(len(x), loss, best[:, 0].double().mean().item(), best.sum().item() / len(x))
