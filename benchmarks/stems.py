"""The convolutions of a hybrid's ResNet (fastvit/hybrid.py), as data: how large each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvit.config import ViTConfig

STEM_WIDTH, EXPANSION = 64, 4


@dataclass(frozen=True)
class Convolution:
    """One image's maps (inputs, positions_read) to (outputs, positions_written) by filters inputs x side x side."""

    inputs: int
    outputs: int
    side: int
    positions_read: int
    positions_written: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.side**2

    @property
    def macs(self) -> int:
        """Multiply-adds, those with padding included."""
        return self.weights * self.positions_written

    @property
    def read(self) -> int:
        return self.inputs * self.positions_read

    @property
    def written(self) -> int:
        return self.outputs * self.positions_written


def channels(config: ViTConfig) -> int:
    """Of what is projected: the image's, or the feature map's."""
    if config.backbone is None:
        return config.in_chans
    return EXPANSION * STEM_WIDTH * 2 ** (len(config.backbone) - 1) if config.backbone else STEM_WIDTH


def convolutions(config: ViTConfig) -> list[Convolution]:
    """All of them in their order; none for a model that projects pixels."""
    if config.backbone is None:
        return []

    def positions(stride: int) -> int:
        size = config.img_size
        height, width = (size, size) if isinstance(size, int) else size
        return -(-height // stride) * -(-width // stride)

    found = [Convolution(config.in_chans, STEM_WIDTH, 7, positions(1), positions(2))]
    inputs = STEM_WIDTH
    for stage, depth in enumerate(config.backbone):
        hidden = STEM_WIDTH * 2**stage
        outputs, after = EXPANSION * hidden, positions(4 * 2**stage)
        before = positions(2 * 2**stage) if stage else after
        found.append(Convolution(inputs, outputs, 1, before, after))
        for unit in range(depth):
            at = after if unit else before
            found += [
                Convolution(outputs if unit else inputs, hidden, 1, at, at),
                Convolution(hidden, hidden, 3, at, after),
                Convolution(hidden, outputs, 1, after, after),
            ]
        inputs = outputs
    return found
