"""Tensor parallelism of a Vision Transformer's blocks as a plan of DTensors (Megatron-LM, arXiv 1909.08053, section 3).

Each of W processes computes H / W heads of the attention and F / W hidden units of the MLP; what ``attn.proj`` and
``mlp.fc2`` make of them is summed over the processes. Norms, embeddings and the head are whole, and alike, on all.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from .. import ops
from ..config import ViTConfig
from ..model import VisionTransformer


class HeadsLinear(nn.Module):
    """The packed projection of a process's own heads, (B, N, D) to (B, N, 3 · H / W · E).

    Rows of queries, keys and values are parameters of their own, so that each is sharded by whole heads.
    """

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh, self.has_bias = mesh, linear.bias is not None
        for name, packed in linear.named_parameters():
            for part, rows in zip("qkv", packed.detach().chunk(3), strict=True):
                shard = distribute_tensor(rows.contiguous(), mesh, [Shard(0)])
                self.register_parameter(f"{part}_{name}", nn.Parameter(shard, requires_grad=packed.requires_grad))

    @property
    def weight(self) -> Tensor:
        """(3 · H / W · E, D): this process's rows, packed as the plain layer packs all."""
        return self._local("weight")

    @property
    def bias(self) -> Tensor | None:
        """(3 · H / W · E,) or None."""
        return self._local("bias") if self.has_bias else None

    def _local(self, name: str) -> Tensor:
        shards: list[Any] = [self.get_parameter(f"{part}_{name}") for part in "qkv"]
        return torch.cat([shard.to_local() for shard in shards])

    def forward(self, x: Tensor) -> Tensor:
        # every process knows what its own heads want of dx, and the layers below need the sum
        x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        return ops.linear(x, self.weight, self.bias)


class HeadsParallel(ParallelStyle):
    """Gives each process its share of an attention module's heads; ``proj`` is left to RowwiseParallel."""

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        module.qkv = HeadsLinear(module.qkv, device_mesh)
        module.num_heads //= device_mesh.size()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and not name.startswith(("qkv.", "proj.")):  # norms of heads, relative keys
                parameter.register_hook(partial(_summed, device_mesh))
        return module


def _summed(mesh: DeviceMesh, gradient: Tensor) -> Tensor:
    """The gradient of what all heads share, from what each process's own heads say of it."""
    return DTensor.from_local(gradient, mesh, [Partial()], run_check=False).full_tensor()


def check(config: ViTConfig, world: int) -> None:
    """Raise ValueError unless heads and hidden units can be dealt out evenly."""
    for what, number in (("heads", config.num_heads), ("hidden units of the MLP", config.hidden_dim)):
        if number % world:
            raise ValueError(f"fastvit: parallel 'tp': {number} {what} cannot be shared evenly by {world} processes")


def parallelize(model: VisionTransformer, mesh: DeviceMesh) -> None:
    """Shard the blocks of a model in place; what they hold is process 0's.

    Raises:
        ValueError: heads or hidden units that cannot be dealt out evenly.
    """
    check(model.config, mesh.size())
    plan = {
        "blocks.*.attn": HeadsParallel(),
        "blocks.*.attn.proj": RowwiseParallel(),
        "blocks.*.mlp.fc1": ColwiseParallel(),
        "blocks.*.mlp.fc2": RowwiseParallel(),
    }
    parallelize_module(model, mesh, plan)


def split_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of packed parameters in the plain model, and of the three that stand for each in this one."""
    return {
        f"{name}.{kind}": [f"{name}.{part}_{kind}" for part in "qkv"]
        for name, module in model.named_modules()
        if isinstance(module, HeadsLinear)
        for kind in (("weight", "bias") if module.has_bias else ("weight",))
    }


def join(parts: Sequence[Any]) -> Tensor:
    """Queries', keys' and values' rows as the plain model packs them, rows of that sharded."""
    whole: Any = torch.cat([part.redistribute(placements=[Replicate()]) for part in parts])
    return whole.redistribute(placements=[Shard(0)])


def split(joined: Any) -> list[Tensor]:
    """The inverse of :func:`join`."""
    rows: Any = joined.redistribute(placements=[Replicate()]).chunk(3)
    return [part.redistribute(placements=[Shard(0)]) for part in rows]
