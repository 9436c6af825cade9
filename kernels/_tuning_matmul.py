"""The tiles of linear's and norm_mlp's matrix products, and which of them is predicted to be the quickest.

Asked through `_tuning`, like every other choice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class MatMul:
    """A tile [BLOCK_M, BLOCK_N] of a product, BLOCK_K of the summed axis at a time.

    With DESCRIPTORS the copy engine moves tiles, as many programs as multiprocessors walk them, and the epilogue takes
    a tile in PIECES, for want of registers. GROUP_M row tiles are numbered next to one another (`_tuning.GROUP_M`).
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    DESCRIPTORS: bool = False
    PIECES: int = 1
    GROUP_M: int = 8


@dataclass(frozen=True)
class MatMulWeight:
    """A tile [BLOCK_N, BLOCK_K] of a weight's gradient, BLOCK_M of the rows it is summed over at a time."""

    SUMMED: ClassVar[str] = "M"
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    DESCRIPTORS: bool = False
    GROUP_M: int = 8


@dataclass(frozen=True)
class Epilogue:
    """Element-wise work around a product: a program takes BLOCK_M rows by BLOCK_N columns at a time."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@dataclass(frozen=True)
class WeightSum:
    """Parts of a weight's gradient summed: a program takes a row, BLOCK_K columns of UNROLL parts at once."""

    BLOCK_K: int
    UNROLL: int
    num_warps: int


CHIPS = ("sm_80", "sm_90", "hip")

# linear and norm_mlp, by chip, bytes of an element and whether rows are read 16 bytes at a time. Nothing is measured:
# of the tiles that compile without a spill, `matmul` takes the one whose predicted time is least.
# With 128 x 256 a product moves 0.6 of the bytes of 128 x 128 through L2, which K = 768 keeps busier than the matrix
# unit; 128 sums a thread leave the epilogue a quarter of the tile at a time. A fourth stage fits sm_90 by 3 KiB.
MATMUL = {
    ("sm_90", 2, True): (
        MatMul(128, 256, 64, num_warps=8, num_stages=3, DESCRIPTORS=True, PIECES=4),
        MatMul(128, 128, 64, num_warps=8, num_stages=3, DESCRIPTORS=True, PIECES=2),
        MatMul(64, 128, 64, num_warps=4, num_stages=4),
        MatMul(64, 64, 64, num_warps=4, num_stages=4),
        MatMul(32, 64, 64, num_warps=4, num_stages=4),
        MatMul(16, 64, 64, num_warps=4, num_stages=4),
    ),
    ("sm_80", 2, True): (
        MatMul(128, 128, 64, num_warps=8, num_stages=3),
        MatMul(64, 64, 64, num_warps=4, num_stages=4),
        MatMul(16, 64, 64, num_warps=4, num_stages=4),
    ),
    ("hip", 2, True): (
        MatMul(128, 128, 64, num_warps=8, num_stages=2),
        MatMul(64, 64, 64, num_warps=4, num_stages=2),
        MatMul(16, 64, 64, num_warps=4, num_stages=2),
    ),
    **{
        (chip, 2, False): (
            MatMul(64, 128, 32, num_warps=8, num_stages=2 if chip == "hip" else 3),
            MatMul(16, 64, 32, num_warps=4, num_stages=2 if chip == "hip" else 3),
        )
        for chip in CHIPS
    },
    **{
        (chip, 4, aligned): (
            # With two stages, copied ahead, sm_80 spills behind the norm of the rows.
            MatMul(64, 64, 16, num_warps=4, num_stages=3 if (chip, aligned) == ("sm_80", True) else 2),
            MatMul(16, 64, 16, num_warps=4, num_stages=2),
        )
        for chip in CHIPS
        for aligned in (True, False)
    },
}
MATMUL_WEIGHT = {
    ("sm_90", 2, True): (
        MatMulWeight(64, 128, 256, num_warps=8, num_stages=3, DESCRIPTORS=True),
        MatMulWeight(64, 128, 128, num_warps=8, num_stages=3, DESCRIPTORS=True),
        MatMulWeight(64, 64, 64, num_warps=4, num_stages=4),
    ),
    ("sm_80", 2, True): (
        MatMulWeight(32, 128, 128, num_warps=8, num_stages=3),
        MatMulWeight(64, 64, 64, num_warps=4, num_stages=3),
    ),
    ("hip", 2, True): (
        MatMulWeight(32, 128, 128, num_warps=8, num_stages=2),
        MatMulWeight(64, 64, 64, num_warps=4, num_stages=2),
    ),
    **{(chip, 2, False): (MatMulWeight(32, 64, 64, num_warps=4, num_stages=2),) for chip in CHIPS},
    **{
        # An address for each row takes registers. The rows summed at a time are as many with it, so that a gradient's
        # bits do not depend on how dy lies in memory.
        (chip, 4, aligned): (MatMulWeight(32, 64, 64, num_warps=4 if aligned else 8, num_stages=2),)
        for chip in CHIPS
        for aligned in (True, False)
    },
}
# What the prediction rests on, all of it per multiprocessor and counted in bytes from L2. Multiply-adds in the time of
# a byte: H100 makes 2048 of 16 bits in a clock, and 7 TB/s of L2 are 32 bytes of it.
MULTIPLY_ADDS_PER_BYTE = {
    ("sm_90", 2): 64,
    ("sm_80", 2): 32,
    ("hip", 2): 32,
    ("sm_90", 4): 4,
    ("sm_80", 4): 2,
    ("hip", 4): 4,
}
# Filling the pipeline and emptying the sums, about 2 us of a program; a second launch that adds the parts, 2.5 us.
PROGRAM_BYTES = 112 << 10
SECOND_LAUNCH_BYTES = 140 << 10
# Parts of a sum: more cost more to write and read again than the chip gains.
MOST_PARTS = 16

# Kinds of product ("forward", "input", "weight") at which torch's library beats ours, by (kind, chip, bytes of an
# element): the fewest multiply-adds from which it does. Empty: no GPU has been asked. cuBLAS is known to lose a quarter
# of its speed at the short sums of ViTs, so ours is not the worse guess.
LIBRARY: dict[tuple[str, str, int], int] = {}

# Element-wise passes: 16 elements a thread, whole lines of 256 bytes or more; with sums a program walks down its
# columns, so that each multiprocessor has this many of them, and few partial sums are left.
EPILOGUE = Epilogue(16, 128, num_warps=4)
EPILOGUE_PROGRAMS = 4
# 32 fp32 of a thread on their way at once; ptxas spills one of 64, for the sake of a few more programs.
WEIGHT_SUM = WeightSum(1024, 8, num_warps=8)


@functools.lru_cache(maxsize=1024)
def quickest(
    of_weight: bool, chip: str, itemsize: int, aligned: bool, cores: int, height: int, width: int, depth: int
) -> tuple[MatMul | MatMulWeight, int]:
    """Tile of a product (height, width) summed over depth, and into how many parts that sum is split."""
    tiles = MATMUL_WEIGHT if of_weight else MATMUL

    def bytes_of_time(choice):
        tile, parts = choice
        block_height, block_width, step = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
        if of_weight:
            block_height, block_width, step = tile.BLOCK_N, tile.BLOCK_K, tile.BLOCK_M
        programs = -(-height // block_height) * -(-width // block_width) * parts
        each = max(
            block_height * block_width / MULTIPLY_ADDS_PER_BYTE[chip, itemsize],
            (block_height + block_width) * itemsize,
        )
        total = -(-programs // cores) * (-(-depth // (parts * step)) * step * each + PROGRAM_BYTES)
        return total if parts == 1 else total + SECOND_LAUNCH_BYTES + 8 * parts * height * width / cores

    def splits(tile):
        step = tile.BLOCK_M if of_weight else tile.BLOCK_K
        # Descriptors write the result itself, which is not where the parts of a sum go.
        most = MOST_PARTS if of_weight or not tile.DESCRIPTORS else 1
        return range(1, max(1, min(most, depth // (2 * step))) + 1)

    choices = ((tile, parts) for tile in tiles[chip, itemsize, aligned] for parts in splits(tile))
    return min(choices, key=bytes_of_time)
