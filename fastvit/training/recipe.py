"""How a model is trained, as data: options checked once, and the paper's two recipes (tables 3 and 4)."""

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")
# what may change while a run is resumed, for the mathematics stays: when to look and to save, and how memory is spared
MAY_CHANGE = ("eval_every", "checkpoint_every", "keep", "accumulate", "grad_checkpointing")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Options of a training run; the defaults are the paper's fine-tuning (table 4) on CIFAR.

    A step is one update of the weights by ``batch_size`` images, those of all processes and of all ``accumulate``
    parts together. The learning rate of step k = 0, 1, ... is in :func:`fastvit.training.schedule.learning_rate`.
    ``weight_decay`` is decoupled in AdamW and an L2 term in SGD, as torch.optim has them; it leaves out biases, norms,
    LayerScale and ``model.no_weight_decay()`` (positions, class token). ``dropout`` is the paper's: after every dense
    layer but the projections to queries, keys and values, and after adding positions (appendix B.1). ``ema`` is the
    decay d of averaged weights a = d a + (1 - d) w, updated after every step (Polyak; 0 = off).

    Raises:
        ValueError: an option out of range, or options that contradict each other.
    """

    steps: int = _option(10_000, "Updates of the weights; 0 if epochs says how long.")
    epochs: float = _option(0.0, "Passes over the images; 0 if steps says how long.")
    batch_size: int = _option(512, "Images in one step, of all processes together.")
    accumulate: int = _option(1, "Parts in which a step's images pass through the model, to spare memory.")
    optimizer: str = _option("sgd", f"{' or '.join(OPTIMIZERS)}.")
    lr: float = _option(0.01, "Highest learning rate.")
    momentum: float = _option(0.9, "Of SGD.")
    betas: tuple[float, float] = _option((0.9, 0.999), "Of AdamW.")
    weight_decay: float = _option(0.0, "Not for biases, norms, positions and the class token.")
    schedule: str = _option("cosine", f"How the rate decays: {', '.join(SCHEDULES)}.")
    warmup_steps: int = _option(500, "Steps in which the rate rises linearly.")
    clip: float = _option(1.0, "Largest global norm of the gradient; 0 leaves it.")
    dropout: float = _option(0.0, "After dense layers and positions, as in the paper.")
    drop_path: float = _option(0.0, "Stochastic depth of the last block, rising linearly from 0.")
    label_smoothing: float = _option(0.0, "Share of the target spread over all classes.")
    mixup: float = _option(0.0, "Alpha of mixup; 0 = off.")
    cutmix: float = _option(0.0, "Alpha of CutMix; 0 = off.")
    crop_scale: tuple[float, float] | None = _option((0.05, 1.0), "Share of the area a random crop keeps; 0 = no crop.")
    flip: bool = _option(True, "Mirror half of the images.")
    shift: int = _option(0, "Most pixels an image is shifted by, as usual for CIFAR.")
    ema: float = _option(0.0, "Decay of averaged weights, which are then evaluated and kept; 0 = off.")
    dtype: str = _option("float32", "Of the products: float32, or bfloat16 by autocast.")
    grad_checkpointing: bool = _option(False, "Compute each block again in the backward pass, to spare memory.")
    seed: int = _option(0, "Of weights, order of images, augmentation and dropout.")
    eval_every: int = _option(500, "Steps between evaluations; 0 = at the end alone.")
    checkpoint_every: int = _option(500, "Steps between checkpoints; 0 = at the end alone.")
    keep: int = _option(2, "Newest checkpoints to keep.")

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "accumulate": 1, "keep": 1}
        for name in ("steps", "warmup_steps", "shift", "seed", "eval_every", "checkpoint_every", *least):
            low = least.get(name, 0)
            self._require(name, type(getattr(self, name)) is int and getattr(self, name) >= low, f"an integer >= {low}")
        for name in ("epochs", "clip", "weight_decay", "mixup", "cutmix"):
            self._require(name, self._number(name) and 0 <= getattr(self, name) < float("inf"), "a number >= 0")
        for name in ("momentum", "dropout", "drop_path", "label_smoothing", "ema"):
            self._require(name, self._number(name) and 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("lr", self._number("lr") and 0 < self.lr < float("inf"), "a number > 0")
        for name, valid in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("dtype", DTYPES)):
            self._require(name, getattr(self, name) in valid, f"one of {', '.join(valid)}")
        for name in ("flip", "grad_checkpointing"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        self._require("betas", self._pair("betas") and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        if self.crop_scale is not None:
            fits = self._pair("crop_scale") and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
            self._require("crop_scale", fits, "two shares of the area, 0 < smallest <= largest <= 1, or None")
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(
                f"fastvit: one of steps and epochs says how long, got steps {self.steps} and epochs {self.epochs}"
            )
        self._require(
            "accumulate", self.batch_size % self.accumulate == 0, f"a divisor of batch_size {self.batch_size}"
        )
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(f"fastvit: warmup_steps must be below steps {self.steps}, got {self.warmup_steps}")

    def _number(self, name: str) -> bool:
        return isinstance(getattr(self, name), (int, float)) and not isinstance(getattr(self, name), bool)

    def _pair(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, (int, float)) for part in value)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"fastvit: {name} must be {expected}, got {getattr(self, name)!r}")

    def override(self, **options: Any) -> "Recipe":
        """This recipe with some options replaced; ``steps`` alone ends what ``epochs`` said, and the other way round.

        Raises:
            TypeError: an option that does not exist; the message names the closest. ValueError: one out of range.
        """
        valid = [f.name for f in fields(Recipe)]
        for name in options:
            if name not in valid:
                close = difflib.get_close_matches(name, valid, n=3) or valid
                raise TypeError(f"fastvit: unknown recipe option {name!r}; expected one of {', '.join(close)}")
        if options.get("steps") and "epochs" not in options:
            options["epochs"] = 0.0
        if options.get("epochs") and "steps" not in options:
            options["steps"] = 0
        return replace(self, **options)


RECIPES: dict[str, Recipe] = {
    # table 3, ImageNet from scratch; weight decay is 0.1 on the larger sets, the decay linear, dropout 0 or 0.1
    "pretrain": Recipe(
        steps=0,
        epochs=300.0,
        batch_size=4096,
        optimizer="adamw",
        lr=3e-3,
        weight_decay=0.3,
        warmup_steps=10_000,
        dropout=0.1,
    ),
    # table 4; its rates are tried from {0.001, 0.003, 0.01, 0.03} on CIFAR, {0.003, 0.01, 0.03, 0.06} for 20,000 steps
    # on ImageNet. The paper names no warm-up; 500 steps are those of the code it came with.
    "finetune": Recipe(),
}


def recipe_of(given: str | Recipe, **options: Any) -> Recipe:
    """A recipe by name or as it is, with some options replaced.

    Raises:
        ValueError: no recipe of that name, or what :meth:`Recipe.override` raises.
    """
    if isinstance(given, str):
        if given not in RECIPES:
            raise ValueError(f"fastvit: unknown recipe {given!r}; expected one of {', '.join(RECIPES)}")
        given = RECIPES[given]
    return given.override(**options)
