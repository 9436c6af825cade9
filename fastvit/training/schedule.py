"""The learning rate as a function of the step, so that nothing of it has to be saved."""

import math

from .recipe import Recipe


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of step k = 0 .. n - 1 of n, with w steps of warm-up:

        k < w:   lr (k + 1) / w
        else:    lr f((k - w) / (n - w)),   f(t) = (1 + cos(π t)) / 2 (cosine), 1 - t (linear), 1 (constant)

    as in appendix B.1 of the paper.
    """
    warm = recipe.warmup_steps
    if step < warm:
        return recipe.lr * (step + 1) / warm
    t = (step - warm) / max(1, steps - warm)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * t))
    return recipe.lr * (1.0 - t) if recipe.schedule == "linear" else recipe.lr
