"""Weights, optimiser state and averages of a run of several processes, by torch.distributed.checkpoint.

Each process writes its shards as safetensors, nothing is pickled. Names and shapes are those of the plain model however
it is parallelised, so that any number of processes in any mode reads what others wrote.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .checkpoints import safetensors_torch
from .error import TrainingError
from .tensor_parallel import join, split, split_names

Averages = Mapping[str, Tensor] | None


class Key(NamedTuple):
    """A tensor of a checkpoint: "model", "average" or "optimizer", of which parameter, and what of it (exp_avg ...)."""

    kind: str
    name: str
    what: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, self))


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, averages: Averages) -> None:
    """Write into a folder, which is made if need be and else is empty; every process calls it.

    Raises:
        TrainingError: on every process, when one could not write. ImportError: safetensors is not installed.
    """
    safetensors_torch()
    tensors, _ = _read(model, optimizer if optimizer is not None and optimizer.state else None, averages)
    written = {str(key): _with_dimension(t.detach()) for key, t in _joined(model, tensors).items()}
    with _one_error(f"fastvit: cannot write {folder}"), _single_process_is_fine():
        dcp.save(written, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, averages: Averages) -> None:
    """Read what :func:`save` wrote into a model, its optimiser and averages; every process calls it.

    Raises:
        TrainingError: on every process, before anything is changed: files that cannot be read, or tensors that are
            missing or of other shapes.
    """
    safetensors_torch()
    with _one_error(f"fastvit: cannot read {folder}"):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
        there = {name: tuple(entry.size) for name, entry in entries.items()}
        for name, entry in entries.items():  # the reader would leave the numbers of a lost file as they are
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise ValueError(f"a shard of {name} is missing")
    trained = any(name.startswith("optimizer/") for name in there)
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)  # get_optimizer_state_dict makes no state while there are gradients
    tensors, state = _read(model, optimizer if trained else None, averages)
    joined = _joined(model, tensors)
    for key in list(joined):
        if key.kind == "optimizer" and str(key) not in there and not _has_state(there, key.name):
            del joined[key]  # it never had a gradient
    wanted = {str(key): tuple(_with_dimension(t).shape) for key, t in joined.items()}
    with _one_error(f"fastvit: {folder} does not fit"):
        _check(there, wanted)
    buffers = {str(key): _with_dimension(torch.zeros_like(t)) for key, t in joined.items()}
    with _one_error(f"fastvit: cannot read {folder}"), _single_process_is_fine():
        dcp.load(buffers, storage_reader=reader)
    found = _split(model, {key: buffers[str(key)].reshape(t.shape) for key, t in joined.items()})
    set_model_state_dict(model, {key.name: t for key, t in found.items() if key.kind == "model"})
    with torch.no_grad():
        for key, tensor in found.items():
            if key.kind == "average":
                tensors[key].copy_(tensor)
    if optimizer is None:
        return
    if not trained:
        optimizer.state.clear()
        return
    state["state"] = {}
    for key, tensor in found.items():
        if key.kind == "optimizer":
            state["state"].setdefault(key.name, {})[key.what] = tensor
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))


def full_state(model: nn.Module, averages: Averages, keep: bool) -> dict[str, Tensor]:
    """The plain model's state_dict on the CPU with averages in their parameters' places, empty unless ``keep``."""
    tensors, _ = _read(model, None, averages)
    for key in [key for key in tensors if key.kind == "average"]:
        tensors[Key("model", key.name)] = tensors.pop(key)
    state = {}
    for key, tensor in _joined(model, tensors).items():
        whole = _whole(tensor)  # by all processes, one tensor at a time
        if keep:
            state[key.name] = whole.detach().to("cpu", copy=True)
    return state


def local_tensors(model: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by the plain model's names, as this model has them: its names, its shards (the state_dict's)."""
    tensors, _ = _read(model, None, None)
    like: dict[Key, Any] = {Key("model", key.name): t for key, t in _joined(model, tensors).items()}
    unknown = next((name for name in whole if Key("model", name) not in like), None)
    if unknown is not None:
        raise TrainingError(f"fastvit: {unknown!r} is no parameter of the model")
    given: dict[Key, Tensor] = {}
    for name, tensor in whole.items():
        mine = like[Key("model", name)]
        if tensor.shape != mine.shape:
            raise TrainingError(f"fastvit: {name} is {list(tensor.shape)}, expected {list(mine.shape)}")
        tensor = tensor.to(mine.device, mine.dtype)
        if isinstance(mine, DTensor):
            tensor = distribute_tensor(tensor, mine.device_mesh, mine.placements, src_data_rank=None)
        given[Key("model", name)] = tensor
    return {key.name: tensor for key, tensor in _split(model, given).items()}


def _read(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, averages: Averages
) -> tuple[dict[Key, Tensor], dict[str, Any]]:
    """All tensors under their names in this model (DDP's prefix left out), and the optimiser's state_dict."""
    tensors = {Key("model", name): t for name, t in get_model_state_dict(model).items() if isinstance(t, Tensor)}
    prefix = "module." if isinstance(model, DistributedDataParallel) else ""
    tensors |= {Key("average", name.removeprefix(prefix)): t for name, t in (averages or {}).items()}
    state: Any = {}
    if optimizer is not None:
        state = get_optimizer_state_dict(model, optimizer)
        for name, its in state["state"].items():
            tensors |= {Key("optimizer", name, what): t for what, t in its.items() if isinstance(t, Tensor)}
    return tensors, state


def _joined(model: nn.Module, tensors: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """The same under the plain model's names: what tensor parallelism has split is packed again."""
    result = dict(tensors)
    for plain, parts in split_names(model).items():
        for key in [key for key in tensors if key.name == parts[0]]:
            own = [result.pop(key._replace(name=part)) for part in parts]
            result[key._replace(name=plain)] = own[0] if own[0].dim() == 0 else join(own)
    return result


def _split(model: nn.Module, tensors: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """The inverse of :func:`_joined`."""
    result = dict(tensors)
    for plain, parts in split_names(model).items():
        for key in [key for key in tensors if key.name == plain]:
            packed = result.pop(key)
            own = [packed.clone() for _ in parts] if packed.dim() == 0 else split(packed)
            result |= {key._replace(name=part): t for part, t in zip(parts, own, strict=True)}
    return result


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _with_dimension(tensor: Tensor) -> Tensor:
    """The reader takes slices, which a number without dimensions has not."""
    return tensor.reshape(1) if tensor.dim() == 0 else tensor


def _has_state(there: dict[str, Any], name: str) -> bool:
    return any(key.startswith(f"optimizer/{name}/") for key in there)


def _check(there: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"it has no {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    for name, shape in wanted.items():
        if there[name] != shape:
            raise ValueError(f"{name} is {list(there[name])}, expected {list(shape)}")
    surplus = [name for name in there if name.startswith("model/") and name not in wanted]
    if surplus:
        raise ValueError(f"it has {surplus[0]}, which the model has not")


@contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Any error inside, of any process, as one TrainingError on all of them."""
    together = dist.is_initialized()
    own: BaseException | None = None
    rank = dist.get_rank() if together else 0
    try:
        yield
    except dcp.CheckpointException as error:  # no Exception, and already the same on all
        rank, (own, _) = next(iter(error.failures.items()))
    except Exception as error:
        own = error
    reasons: list[Any] = [None if own is None else (rank, _reason(own))]
    if together:
        mine, reasons = reasons[0], [None] * dist.get_world_size()
        dist.all_gather_object(reasons, mine)
    for rank, reason in filter(None, reasons):
        raise TrainingError(f"{what}: {reason}" + (f" (process {rank})" if together else "")) from own


def _reason(error: BaseException) -> str:
    """In one line."""
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + (getattr(error, "strerror", None) or " ".join(str(error).split()))


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
