"""Several processes that train one model: DDP, FSDP2 and tensor parallelism, all torch.distributed's own.

Processes are started by torchrun. A process that was not, or a run of one, computes what it would compute alone.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..model import VisionTransformer

MODES = ("none", "ddp", "fsdp", "tp")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Parallel:
    """What one process of a run knows about the others.

    Every method but ``accumulating`` is a collective: all processes call it, in the same order.

    Attributes:
        mode: "none", "ddp" (every process has the whole model and its own images), "fsdp" (its own images and a shard
            of every parameter) or "tp" (the same images and its own heads and hidden units).
        rank, world: this process's number, and how many there are. is_main: whether it is number 0.
        device: where this process computes.
        data_rank, data_world: which share of the data this process reads, of how many.
        optimizer_options: what ``torch.optim`` has to be told, as keywords.

    Under tensor parallelism dropout inside a layer (of attention's rows, of hidden units) draws the same pattern for
    every process's share; elsewhere it is what one process would draw.
    """

    def __init__(self, mode: str, device: torch.device, rank: int = 0, world: int = 1, owner: bool = False) -> None:
        self.mode, self.device, self.rank, self.world = mode, device, rank, world
        self.is_main = rank == 0
        self.data_rank, self.data_world = (0, 1) if mode == "tp" else (rank, world)
        # tensor parallelism leaves plain parameters beside sharded ones, which no multi-tensor kernel takes at once
        self.optimizer_options: dict[str, Any] = {"foreach": False, "fused": False} if mode == "tp" else {}
        self._owner = owner
        self._mesh: DeviceMesh | None = None

    @classmethod
    def start(cls, mode: str = "auto", device: str = "") -> "Parallel":
        """Join the processes that torchrun started.

        Args:
            mode: one of the modes, or "auto": "ddp" where torchrun (or ``torch.distributed.init_process_group``) was
                there before, else "none".
            device: "cpu" or "cuda", each process taking the GPU of its local rank; CUDA if there is one by default.
                Without other processes any of torch's devices.

        Raises:
            ValueError: an unknown mode, several processes asked for without torchrun or the other way round, or a
                device that processes cannot share so.
        """
        if mode not in (*MODES, "auto"):
            raise ValueError(f"fastvit: parallel must be one of auto, {', '.join(MODES)}, got {mode!r}")
        ready = dist.is_available() and dist.is_initialized()
        launched = ready or (dist.is_available() and dist.is_torchelastic_launched())
        if mode == "auto":
            mode = "ddp" if launched else "none"
        if mode == "none":
            if launched:
                raise ValueError(
                    "fastvit: parallel 'none', but torchrun has started this process among others: "
                    "each would train a model of its own; say auto, ddp, fsdp or tp"
                )
            return cls(mode, _alone(device))
        if not launched:
            raise ValueError(
                f"fastvit: parallel {mode!r} needs several processes: start it by "
                "torchrun --nproc-per-node N -m fastvit ..."
            )
        own = _share(device)
        if not ready:
            # a device that NCCL knows from the start needs no guess at the first barrier
            dist.init_process_group(BACKENDS[own.type], device_id=own if own.type == "cuda" else None)
        return cls(mode, own, dist.get_rank(), dist.get_world_size(), owner=not ready)

    @property
    def mesh(self) -> DeviceMesh:
        """All processes in one row."""
        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.world,))
        return self._mesh

    def seed(self, seed: int) -> None:
        """Seed torch's generators: another stream for each share of the data, one for processes that share it."""
        torch.manual_seed(seed + self.data_rank)

    def wrap(self, model: VisionTransformer) -> nn.Module:
        """The model on this process's device, computing together with the others'; all begin with process 0's weights.

        Build the optimiser from the result's parameters, with ``optimizer_options``.

        Raises:
            ValueError: tensor parallelism whose processes cannot share heads or hidden units evenly.
        """
        model = model.to(self.device)
        if self.mode == "none":
            return model
        if self.mode == "ddp":
            for parameter in model.parameters():
                if parameter.requires_grad and 1 in parameter.shape:
                    parameter.register_hook(_in_order)
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if self.mode == "tp":
            from . import tensor_parallel  # which takes as long to import as fastvit itself

            tensor_parallel.check(model.config, self.world)
            self._equalize(model)
            tensor_parallel.parallelize(model, self.mesh)
            return model
        from torch.distributed.fsdp import fully_shard

        self._equalize(model)
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        # by default the root stays whole behind a forward without backward, and would not see its weights change
        fully_shard(model, mesh=self.mesh, reshard_after_forward=True)
        return model

    def _equalize(self, model: nn.Module) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Where forward and backward of a micro-batch run: gradients are exchanged at the last one only.

        ``with parallel.accumulating(model, last=i == n - 1): (loss(model(x)) / n).backward()``
        """
        if isinstance(model, DistributedDataParallel):
            return nullcontext() if last else model.no_sync()
        if self.mode == "fsdp":
            sharded: Any = model
            sharded.set_requires_gradient_sync(last)
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the shares of the data, a new tensor without gradient."""
        value = value.detach().clone()
        if self.data_world > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the shares of the data, a new tensor without gradient."""
        return self.sum(value) / self.data_world

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale all gradients so that their L2 norm is at most ``max_norm`` (0: none is).

        Returns:
            The norm over all parameters of the whole model before that, a plain tensor equal on every process.
        """
        parameters = [p for p in model.parameters() if p.grad is not None]
        kinds = [[p for p in parameters if isinstance(p.grad, DTensor) is sharded] for sharded in (False, True)]
        norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
        whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total = torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros((), device=self.device)
        if max_norm > 0:
            for kind in kinds:
                clip_grads_with_norm_(kind, max_norm, total)
        return total

    def save(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write weights, the optimiser's state and averages into a folder, which is made if need be and else is empty.

        Rates and other settings of the optimiser are not written: they come from the recipe.

        Args:
            averages: tensors as the wrapped model's parameters are (sharded where those are), by their names in it.

        Raises:
            TrainingError: on every process, when one could not write.
        """
        from . import distributed_checkpoints

        distributed_checkpoints.save(folder, model, optimizer, averages)

    def load(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Read what :meth:`save` wrote, in this or another mode, by as many processes or others, in place.

        Raises:
            TrainingError: on every process, and nothing is changed: files that cannot be read, or tensors that are
                missing or of other shapes.
        """
        from . import distributed_checkpoints

        distributed_checkpoints.load(folder, model, optimizer, averages)

    def full_state(self, model: nn.Module, averages: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The plain model's state_dict, whole tensors on the CPU, with averages in place of the parameters they are of.

        All processes gather; the main one gets the tensors, the others an empty dictionary.
        """
        from . import distributed_checkpoints

        return distributed_checkpoints.full_state(model, averages, keep=self.is_main)

    def local_tensors(self, model: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`full_state` for some of its tensors, which every process has whole.

        Returns:
            What the model's parameters of these names would be, under the names that ``model.named_parameters()`` has
            for them (without DDP's "module."), sharded where those are. Nothing is changed.

        Raises:
            TrainingError: a name that the model has not, or another shape.
        """
        from . import distributed_checkpoints

        return distributed_checkpoints.local_tensors(model, whole)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        """Leave the other processes; nothing else works afterwards."""
        if self._owner and dist.is_initialized():
            dist.destroy_process_group()
        self._owner = False


def _in_order(gradient: Tensor) -> Tensor:
    """With a new tensor's strides: the only row of a slice has those of the whole, of which DDP warns."""
    return gradient.flatten().view(gradient.shape)


def _alone(device: str) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _share(device: str) -> torch.device:
    """The device of this process among those of its machine."""
    asked = _alone(device)
    if asked.type not in BACKENDS or asked.index is not None:
        raise ValueError(f"fastvit: several processes train on 'cpu' or 'cuda', each on its own GPU, got {device!r}")
    if asked.type == "cpu":
        return asked
    local, there = dist.get_node_local_rank(fallback_rank=0), torch.cuda.device_count()
    if local >= there:
        raise ValueError(f"fastvit: process {local} of this machine has no GPU of its own, there are {there}")
    own = torch.device("cuda", local)
    torch.cuda.set_device(own)
    return own
