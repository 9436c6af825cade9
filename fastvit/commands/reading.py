"""Images read and resized in processes of their own, batch by batch, while the model works on those before."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .terminal import UsageError

if TYPE_CHECKING:
    from fastvit.images import Preprocessing


class Read(NamedTuple):
    """A batch: which images it has, their pixels as uint8 (B, 3, height, width), and the others with the reason."""

    indices: list[int]
    pixels: torch.Tensor
    unreadable: list[tuple[int, str]]


class _Images(Dataset):
    def __init__(self, files: Sequence[str], prepare: "Preprocessing") -> None:
        self.files, self.prepare = files, prepare

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str]:
        from fastvit.images import ImageError

        try:
            return index, self.prepare.read_pixels(Path(self.files[index]))
        except ImageError as error:
            return index, str(error)


def _collate(read: Sequence[tuple[int, torch.Tensor | str]]) -> Read:
    good = [(index, pixels) for index, pixels in read if isinstance(pixels, torch.Tensor)]
    bad = [(index, why) for index, why in read if isinstance(why, str)]
    pixels = torch.stack([pixels for _, pixels in good]) if good else torch.empty(0, dtype=torch.uint8)
    return Read([index for index, _ in good], pixels, bad)


def batches(
    files: Sequence[str],
    spans: Sequence[tuple[int, range]],
    prepare: "Preprocessing",
    batch_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[int, Read]]:
    """Batches of the images of each span, in order and never across two spans, each with the number of its span."""
    plan = [
        (number, indices[start : start + batch_size])
        for number, indices in spans
        for start in range(0, len(indices), batch_size)
    ]
    loader = DataLoader(
        _Images(files, prepare),
        batch_sampler=[list(indices) for _, indices in plan],
        num_workers=min(workers, len(plan)),
        collate_fn=_collate,
        pin_memory=pin_memory,
    )
    try:
        for (number, _), read in zip(plan, loader, strict=True):
            yield number, read
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise UsageError(f"a process that decodes images ended early ({str(error).splitlines()[0]})") from None
