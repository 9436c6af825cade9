"""Batches of a source that are a function of seed, epoch, step and rank, and of nothing else."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import augment, mix
from .augment import Augmentation
from .source import DataError, InMemory, Source

# what a generator of random numbers is for, so that no two draw the same
_ORDER, _MOVE, _CROP, _MIX = range(4)


class Batches:
    """Batches of labelled images for one process of a run.

    The global batch of a step has `world * batch_size` images, of which rank r takes the rows from r * batch_size on;
    together the ranks see what one process with the whole batch size sees. Training shuffles by (seed, epoch) and
    drops what does not fill a last global batch. Evaluation keeps the source's order and drops nothing: every rank
    makes the same number of steps, in the last of which its batch may be short or empty.

    Random numbers come from generators of their own, seeded by (seed, epoch) and the image or the step: torch's,
    numpy's and Python's global ones are neither read nor changed. mixup and CutMix draw alike on all ranks and pair the
    images of a rank with each other.

    Args:
        source: labelled images; one in memory is cut into batches without a loop.
        batch_size: images of this rank in a step.
        size: (height, width) of what comes out.
        train: shuffled and augmented, or in order and as they are.
        augmentation: applied in training alone.
        seed: at least 0.
        workers: processes that decode and augment; 0 does it in this one. They live as long as this object. None: none
            for images in memory, else half of the cores that this process has beside others of its machine.
        rank, world: of the processes among which the data are divided.
        resample: "bicubic" or "bilinear", antialiased.
        crop_pct: the share of a side that evaluation's centre crop keeps of an image not yet of `size`.

    Attributes:
        steps: batches in an epoch, the same on every rank.

    Raises:
        ValueError: an argument outside of its range.
        DataError: no image to evaluate, or too few to train one global batch.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        size: tuple[int, int],
        train: bool,
        augmentation: Augmentation,
        seed: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
        resample: str = "bicubic",
        crop_pct: float = 1.0,
    ) -> None:
        if workers is None:
            workers = 0 if isinstance(source, InMemory) else half_of_the_cores(world)
        _check(batch_size=(batch_size, 1), workers=(workers, 0), world=(world, 1), rank=(rank, 0), seed=(seed, 0))
        _check(height=(size[0], 1), width=(size[1], 1))
        if rank >= world:
            raise ValueError(f"fastvit.data: rank must be below world, got rank {rank} of {world}")
        if resample not in augment.RESAMPLE:
            raise ValueError(f"fastvit.data: resample must be one of {augment.RESAMPLE}, got {resample!r}")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"fastvit.data: crop_pct must be in 0 < crop_pct <= 1, got {crop_pct!r}")
        count, whole = len(source), world * batch_size
        self.steps = count // whole if train else -(-count // whole)
        if not self.steps:
            wanted = f"one global batch has {whole}" if train else "expected at least one"
            raise DataError(f"{source.name}: {count} images, but {wanted}")
        in_evaluation = 1.0 if train else crop_pct
        shape = size[0], size[1]
        made = _Steps(source, batch_size, shape, train, augmentation, seed, rank, world, resample, in_evaluation)
        self._order = _Order(self.steps)
        self._loader: DataLoader[Any] = DataLoader(
            made,
            batch_size=None,
            sampler=self._order,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # torch's global one would be drawn from
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on; one epoch at a time.

        Yields:
            Images, uint8 (B, C, height, width), and labels, int64 (B,), or targets, fp32 (B, K), where training mixes.

        Raises:
            ValueError: a negative epoch, a step that the epoch does not have.
            DataError: an image that cannot be read, when its batch's turn comes.
        """
        _check(epoch=(epoch, 0), start=(start, 0))
        if start > self.steps:
            raise ValueError(f"fastvit.data: start must be at most the {self.steps} steps of an epoch, got {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._order.epoch, self._order.start = epoch, start
        for batch in self._loader if start < self.steps else ():
            if isinstance(batch, DataError):
                # a new one: this frame would hold itself by the traceback, and garbage waits seconds for its workers
                raise DataError(*batch.args)
            images, targets = batch  # a list where the loader has pinned them
            yield images, targets


class _Order(Sampler[tuple[int, int]]):
    """The steps to make, as (epoch, step): what workers that outlive an epoch are told."""

    def __init__(self, steps: int) -> None:
        self.steps, self.epoch, self.start = steps, 0, 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, step) for step in range(self.start, self.steps))


@dataclass
class _Steps(Dataset[Any]):
    """What a worker does: (epoch, step) becomes a batch, or the error of an image in it."""

    source: Source
    batch_size: int
    size: tuple[int, int]
    train: bool
    augmentation: Augmentation
    seed: int
    rank: int
    world: int
    resample: str
    crop_pct: float
    drawn: tuple[int, np.ndarray, np.ndarray] = field(default=(-1, np.empty(0), np.empty(0)))

    def __getitem__(self, which: tuple[int, int]) -> "tuple[Tensor, Tensor] | DataError":
        try:
            return self._batch(*which)
        except DataError as error:  # as a value: the loader would put a worker's traceback into its message
            return error

    def _batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        first = (step * self.world + self.rank) * self.batch_size
        if not self.train:
            return self._read(np.arange(first, min(first + self.batch_size, len(self.source))), epoch)
        order, moves = self._draws(epoch)
        indices = order[first : first + self.batch_size]
        images, labels = self._read(indices, epoch)
        images = augment.moved(images, moves[indices], self.augmentation.flip, self.augmentation.shift)
        mixed = mix.draw(self.augmentation, self.size, np.random.default_rng((self.seed, epoch, _MIX, step)))
        return mixed(images, labels, len(self.source.classes)) if mixed else (images, labels)

    def _draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of the images, and each image's three numbers for :func:`augment.moved`."""
        if self.drawn[0] != epoch:
            order = np.random.default_rng((self.seed, epoch, _ORDER)).permutation(len(self.source))
            moves = np.random.default_rng((self.seed, epoch, _MOVE)).random((len(order), 3), dtype=np.float32)
            self.drawn = epoch, order, moves
        return self.drawn[1:]

    def _read(self, indices: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Images of the wanted size, uint8 (B, C, height, width), and their labels, int64 (B,)."""
        source, scale = self.source, self.augmentation.crop_scale if self.train else None
        if isinstance(source, InMemory) and scale is None:
            chosen = torch.from_numpy(indices)
            return self._whole(source.images[chosen]).contiguous(), source.labels[chosen]
        images, labels = [], []
        for index in map(int, indices):
            image, label = source[index]
            if not 0 <= label < len(source.classes):
                raise DataError(
                    f"{source.name}: image {index} has label {label}, expected 0 to {len(source.classes) - 1}"
                )
            try:
                images.append(
                    self._whole(image[None]) if scale is None else self._crop(image[None], scale, epoch, index)
                )
            except DataError as error:
                raise DataError(f"{source.name}: image {index}: {error}") from None
            labels.append(label)
        if not images:
            return torch.empty(0, source[0][0].shape[0], *self.size, dtype=torch.uint8), torch.empty(
                0, dtype=torch.int64
            )
        return torch.cat(images).contiguous(), torch.tensor(labels)

    def _whole(self, images: Tensor) -> Tensor:
        return augment.centred(images, self.size, self.crop_pct, self.resample)

    def _crop(self, image: Tensor, scale: tuple[float, float], epoch: int, index: int) -> Tensor:
        rng = np.random.default_rng((self.seed, epoch, _CROP, index))
        height, width = image.shape[-2:]
        top, left, high, wide = augment.crop_box(height, width, scale, rng)
        return augment.resized(image[..., top : top + high, left : left + wide], self.size, self.resample)


def half_of_the_cores(world: int) -> int:
    """At least one; of a machine with GPUs each serves one process."""
    sharing = min(world, torch.cuda.device_count() or world)
    return max(1, (os.cpu_count() or 1) // (2 * sharing))


def _as_it_is(batch: Any) -> Any:
    return batch


def _check(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"fastvit.data: {name} must be a whole number of at least {least}, got {value!r}")
