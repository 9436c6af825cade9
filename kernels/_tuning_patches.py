"""The tiles of patch_embed. Not measured yet: those that compile without a spill, large ones first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ._tuning import CORES, GROUP_M


@dataclass(frozen=True)
class PatchProduct:
    """A tile [BLOCK_M, BLOCK_N] of a product, BLOCK_K of the summed axis at a time.

    GROUP_M row tiles are numbered next to one another, so that patches are read from memory once and then from L2.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = GROUP_M


@dataclass(frozen=True)
class PatchSum:
    """Rows summed: BLOCK_M of them and BLOCK_D columns at once."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int


# Hopper reads both sides of a product from shared memory, which keeps up with 128 x 256 and not with 128 x 128.
_WIDE = PatchProduct(128, 256, 64, num_warps=8, num_stages=3)
_SQUARE = PatchProduct(128, 128, 64, num_warps=8, num_stages=3)
_SMALL = PatchProduct(64, 64, 64, num_warps=4, num_stages=3)
_FEW = PatchProduct(64, 32, 64, num_warps=4, num_stages=4)
# Rows that are read two or four bytes at a time cost an address for each of them.
_UNALIGNED = PatchProduct(128, 128, 32, num_warps=8, num_stages=3)
_SMALL_UNALIGNED = PatchProduct(64, 64, 32, num_warps=4, num_stages=3)
# With 64 x 64 over 4 warps ptxas aims at 96 registers, for a fifth block on the chip, and spills two of them.
_FP32 = PatchProduct(128, 64, 16, num_warps=8, num_stages=2)
_SMALL_FP32 = PatchProduct(32, 32, 16, num_warps=4, num_stages=2)
# 64 KiB of local memory.
_AMD = PatchProduct(128, 128, 64, num_warps=8, num_stages=2)
_SMALL_AMD = PatchProduct(64, 64, 64, num_warps=4, num_stages=2)
_AMD_UNALIGNED = PatchProduct(64, 128, 32, num_warps=8, num_stages=2)
_SMALL_AMD_UNALIGNED = PatchProduct(64, 64, 32, num_warps=4, num_stages=2)

# By chip, bytes of a number, and whether image and weight are read 16 bytes at a time. The first tile of which there
# are enough to occupy the chip is taken, the last if none is small enough.
PATCHES = {
    ("sm_80", 2, True): (_SQUARE, _SMALL),
    ("sm_80", 2, False): (_UNALIGNED, _SMALL_UNALIGNED),
    ("sm_90", 2, True): (_WIDE, _SQUARE, _SMALL, _FEW),
    ("sm_90", 2, False): (_UNALIGNED, _SMALL_UNALIGNED),
    ("hip", 2, True): (_AMD, _SMALL_AMD),
    ("hip", 2, False): (_AMD_UNALIGNED, _SMALL_AMD_UNALIGNED),
    **{(chip, 4, aligned): (_FP32, _SMALL_FP32) for chip in CORES for aligned in (True, False)},
}
# A byte becomes 16 bits in registers, and those of 64 at once spill beside the sums of the widest tile.
BYTE_DEPTH = 32
# A part of the weight's gradient sums at least this many patches: fewer would not pay for writing and reading it.
SPLIT_PATCHES = 256
# Sums in registers that leave a core room for one program; of smaller tiles it runs several.
CORE_SUMS = 128 * 256
# 16 numbers a thread on their way at once, or addresses of single ones spill. 768 columns make three programs a token,
# which have 36 KB under way on each of 132 cores.
TOKENS_SUM = PatchSum(16, 256, num_warps=8)
# Few rows are the parts of a weight's gradient: all are read at once.
PARTS_SUM = PatchSum(8, 512, num_warps=8)
# Few columns in all are the bias: 196 tokens in two steps, of 768 columns in 24 programs.
BIAS_SUM = PatchSum(128, 32, num_warps=8)
FEW_COLUMNS = 8192


def patches(
    chip: str, itemsize: int, row_count: int, width: int, aligned: bool, of_bytes: bool = False
) -> PatchProduct:
    tiles = PATCHES[chip, itemsize, aligned]
    tile = next((t for t in tiles if _count(t, row_count, width) >= CORES[chip]), tiles[-1])
    return replace(tile, BLOCK_K=min(tile.BLOCK_K, BYTE_DEPTH)) if of_bytes else tile


def patches_weight(
    chip: str, itemsize: int, row_count: int, width: int, depth: int, aligned: bool
) -> tuple[PatchProduct, int]:
    """Tile of the weight's gradient (width, depth), and into how many parts its sum over the rows is split."""
    tile = PATCHES[chip, itemsize, aligned][0]
    programs = CORES[chip] * max(1, CORE_SUMS // (tile.BLOCK_M * tile.BLOCK_N))
    return tile, max(1, min(programs // _count(tile, width, depth), row_count // SPLIT_PATCHES))


def patches_sum(groups: int, row_count: int, width: int) -> PatchSum:
    """Tile for the sums over row_count rows of each group."""
    if row_count <= PARTS_SUM.BLOCK_M:
        return PARTS_SUM
    return BIAS_SUM if groups * width <= FEW_COLUMNS else TOKENS_SUM


def _count(tile: PatchProduct, row_count: int, width: int) -> int:
    return -(-row_count // tile.BLOCK_M) * -(-width // tile.BLOCK_N)
