"""Runs small enough for tests: a model of two narrow blocks on a set of 80 random images."""

import sys
import time
from pathlib import Path

import torch

from fastvit import ViTConfig
from fastvit.data import InMemory
from fastvit.training import train
from fastvit.training.log import read_log

TINY = ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0)
# dropout, mixup and averages: what a run that goes on must not draw or begin anew
HARD = {
    "recipe": "pretrain",
    "steps": 30,
    "batch_size": 8,
    "lr": 3e-3,
    "warmup_steps": 4,
    "dropout": 0.1,
    "drop_path": 0.2,
    "mixup": 0.5,
    "crop_scale": None,
    "shift": 2,
    "ema": 0.9,
    "label_smoothing": 0.1,
    "eval_every": 10,
    "checkpoint_every": 7,
}


def images(count: int = 80, classes: int = 3, seed: int = 0) -> InMemory:
    """Random images with a class that is told by their brightness."""
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=made)
    pixels = torch.randint(0, 120, (count, 3, 32, 32), generator=made) + 60 * labels.view(-1, 1, 1, 1)
    return InMemory("bright", [f"class {k}" for k in range(classes)], pixels.clamp(0, 255).to(torch.uint8), labels)


def run(out: Path, show=None, **changed):
    """A hard run into ``out`` with options changed."""
    options = {"model": TINY, "test": images(24, seed=1), "device": "cpu", **HARD, **changed}
    return train(images(), out, show=show, **options)


def losses(out: Path) -> list[tuple[float, float, float]]:
    """Step, loss and the gradient's norm of each row of a run's log."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(out / "log.csv")]


def main(out: str, threads: str) -> None:
    """A run slow enough to be killed at any of its steps."""
    torch.set_num_threads(int(threads))
    run(Path(out), show=lambda progress: time.sleep(0.04))


if __name__ == "__main__":
    main(*sys.argv[1:])
