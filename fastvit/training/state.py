"""A run's state in a checkpoint's folder: three safetensors files of one process, DCP's of several."""

from pathlib import Path

import torch

from ..model import VisionTransformer
from .average import Average, like
from .checkpoints import read_tensors, write_tensors
from .error import TrainingError
from .optimizer import load_optimizer_tensors, optimizer_tensors
from .parallel import Parallel

WEIGHTS, AVERAGED, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
SHARDED = "sharded"


def save_state(
    folder: Path,
    parallel: Parallel,
    model: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> None:
    """Write weights, averaged weights and the optimiser's state into a folder that is there; every process calls it."""
    if parallel.world > 1:
        parallel.save(folder / SHARDED, model, optimizer, None if average is None else average.tensors)
        return
    write_tensors(folder / WEIGHTS, parallel.full_state(model))
    write_tensors(folder / OPTIMIZER, optimizer_tensors(model, optimizer))
    if average is not None:
        write_tensors(folder / AVERAGED, parallel.full_state(model, average.tensors))


def load_state(
    folder: Path,
    parallel: Parallel,
    model: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> None:
    """Read what :func:`save_state` wrote, with however many processes then and now.

    Tensor parallelism, whose parameters have names of their own, goes on from what several processes wrote alone.

    Raises:
        TrainingError: it does not fit the model.
    """
    try:
        if (folder / SHARDED).exists():
            parallel.load(folder / SHARDED, model, optimizer, None if average is None else average.tensors)
            return
        load_weights(model, read_tensors(folder / WEIGHTS))
        load_optimizer_tensors(model, optimizer, read_tensors(folder / OPTIMIZER))
        if average is not None:
            average.load(read_tensors(folder / AVERAGED))
    except TrainingError:
        raise
    except (KeyError, RuntimeError, ValueError, OSError) as error:
        raise TrainingError(f"fastvit: {folder} does not fit the model: {error}") from error


def load_weights(model: VisionTransformer, tensors: dict[str, torch.Tensor]) -> None:
    """Whole tensors by name into a model whose parameters may be sharded."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(like(tensors[name], p))
