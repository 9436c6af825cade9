"""The processes of a command under torchrun, which share its work; one process that does it alone otherwise."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from .terminal import UsageError

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=7)  # of those that have finished, for the slowest


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int = 0
    world: int = 1

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; a UsageError of its own is raised in all of them, too."""
        made: list[Any] = [None, None]
        if self.rank == 0:
            try:
                made[0] = make()
            except (UsageError, OSError) as error:
                if self.world == 1:
                    raise
                made[1] = error
        if self.world > 1:
            from torch import distributed

            distributed.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def sums(self, *numbers: int) -> list[int]:
        """Each number added over all processes, once all of them have come here."""
        if self.world == 1:
            return list(numbers)
        import torch

        total = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(total)
        return total.tolist()


@contextmanager
def started() -> Iterator[Ranks]:
    """The process group that torchrun means this process to join, on its own GPU where there is one."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.get_node_local_rank() % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
