"""Averaged weights (Polyak): an exponential moving average of the parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """a = d a + (1 - d) w for every parameter w that trains, starting at the parameters themselves.

    Args:
        model: its parameters may be whole or, under FSDP2 and tensor parallelism, each process's shards.
        decay: d.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in named.items()}
        self._step = get_ema_multi_avg_fn(decay)
        pairs = list(zip(self.tensors.values(), self.parameters, strict=True))
        # no multi-tensor kernel takes whole and sharded ones at once
        self._kinds = [[pair for pair in pairs if hasattr(pair[0], "device_mesh") is kind] for kind in (False, True)]

    def update(self) -> None:
        """After a step of the optimiser."""
        for kind in self._kinds:
            if kind:
                self._step([averaged for averaged, _ in kind], [p.detach() for _, p in kind], None)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Whole tensors by name into this average, sharded as it is."""
        for name, mine in self.tensors.items():
            mine.copy_(like(tensors[name], mine))

    def put(self) -> None:
        """Give the model the averaged weights."""
        with torch.no_grad():
            for p, averaged in zip(self.parameters, self.tensors.values(), strict=True):
                p.copy_(averaged)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside, and to the bit its own again afterwards."""
        own = [p.detach().clone() for p in self.parameters]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(self.parameters, own, strict=True):
                    p.copy_(before)


def like(tensor: Tensor, own: Any) -> Tensor:
    """A whole tensor as another of as many elements is: on its device, in its shape, sharded as it is."""
    tensor = tensor.to(own.device).reshape(own.shape)
    if not hasattr(own, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, own.device_mesh, own.placements)
