"""torch.optim's optimisers for a recipe, and their state as tensors by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .average import like
from .error import TrainingError
from .recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe, **options: Any) -> torch.optim.Optimizer:
    """SGD or AdamW over a model's parameters that train, fused where torch can; weight decay on matrices alone.

    Left out of it are vectors (biases, norms, LayerScale) and ``model.no_weight_decay()``. ``options`` are for torch's.
    """
    network: Any = model
    kept = network.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if p.dim() > 1 and name not in kept]
    others = [p for name, p in trained.items() if p.dim() <= 1 or name in kept]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, recipe.weight_decay), (others, 0.0))
        if parameters
    ]
    options = {"lr": recipe.lr, "fused": True, **options}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=recipe.betas, **options)
    return torch.optim.SGD(groups, momentum=recipe.momentum, **options)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the order in which the optimiser numbers them."""
    named = {id(p): name for name, p in model.named_parameters()}
    return [named[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter>/<what>``, e.g. ``head.weight/exp_avg``; rates come from the recipe."""
    names, state = _names(model, optimizer), optimizer.state_dict()["state"]
    return {
        f"{names[number]}/{what}": value
        for number, own in state.items()
        for what, value in own.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises:
        TrainingError: a parameter that the model has not.
    """
    numbers = {name: number for number, name in enumerate(_names(model, optimizer))}
    own = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        if name not in numbers:
            raise TrainingError(f"fastvit: the optimiser's state is of {name!r}, which the model has not")
        state.setdefault(numbers[name], {})[what] = like(value, own[name]) if value.dim() else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
