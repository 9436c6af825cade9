"""One training step of a whole model: what is timed, and the gradient that is judged."""

import copy

import torch
from torch.nn import functional

CHECKED_IMAGES = 2  # as many as the gradients are compared on: fp64 takes its time


class Step:
    """Forward, cross-entropy, backward to every parameter, the optimizer; calling it returns the loss, a scalar.

    Args:
        model: in training mode, its weights in the dtype they are kept in; images (B, C, height, width) like them.
        labels: (B,), classes.
        autocast: the dtype of the products where it is below the weights', None for none.
        optimizer: takes the last part of the step, None for a step without.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        autocast: torch.dtype | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        parameters: list[torch.nn.Parameter] | None = None,
    ) -> None:
        self._model, self._images, self._labels, self._autocast = model, images, labels, autocast
        self._optimizer, self._parameters = optimizer, parameters or list(model.parameters())

    def __call__(self) -> torch.Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        with torch.autocast(self._images.device.type, self._autocast, enabled=self._autocast is not None):
            loss = functional.cross_entropy(self._model(self._images), self._labels)
        loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
        return loss.detach()

    def gradient(self) -> torch.Tensor:
        """The gradients of the first `CHECKED_IMAGES` images as one vector, zeros for a parameter that has none."""
        first = slice(CHECKED_IMAGES)
        Step(self._model, self._images[first], self._labels[first], self._autocast, None, self._parameters)()
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self._parameters])


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW at a rate of 0: all of its work, and the weights that every provider starts from stay."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def labels(batch: int, classes: int, seed: int, device: torch.device) -> torch.Tensor:
    """Seeded random classes (B,); the first of them are the same for every batch size."""
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed)).to(device)


def exact_gradient(model: torch.nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """`Step.gradient` of the same weights and images in fp64."""
    return Step(copy.deepcopy(model).double().train(), images.double(), classes).gradient()
