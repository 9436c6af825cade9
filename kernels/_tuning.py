"""Every block size, warp count and stage count of the Triton kernels, as data, each with its reason.

Not tuned yet: the numbers are the largest round ones with which every kernel compiles for sm_80, sm_90, sm_100 and
gfx942 without a register spill and within 99 KiB of shared memory (64 KiB on AMD), so that consumer chips can too.
`tests/test_aot.py` holds them to that. Tables are keyed by chip (`_device.chip`) and by the bytes of an element:
four-byte operands go through plain multiply-adds on NVIDIA (`input_precision="ieee"`), not a matrix unit, and want
smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rows:
    """Row-wise kernels: BLOCK_M rows of BLOCK_D columns; ONE_TILE says that a whole row fits."""

    BLOCK_M: int
    BLOCK_D: int
    ONE_TILE: bool
    num_warps: int


@dataclass(frozen=True)
class Product:
    """Matrix products: a tile [BLOCK_M, BLOCK_N] of the result, BLOCK_K of the summed axis at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Scores:
    """Attention: BLOCK_M queries against BLOCK_N keys at a time; ONE_PASS says that all keys fit."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_E: int
    ONE_PASS: bool
    num_warps: int
    num_stages: int


# Elements a row-wise program holds at once: 8192 fp32 over 8 warps are 32 registers a thread, and three blocks live.
ROW_ELEMENTS = 8192
# A row wider than that is walked in pieces; with pieces of 8192 the address masks of an odd width spill on gfx942.
ROW_PIECE = 4096
# Below this many columns one row leaves most of a program's threads idle, so a program takes several rows.
NARROW_ROW = 1024

# Programs that occupy every core of the largest chip that a key stands for.
CORES = {"sm_80": 108, "sm_90": 132, "hip": 304}

# Row tiles that share a band of the weight are launched next to one another, so that the band stays in the L2 cache.
GROUP_M = 8

# Three stages of 128 x 64 twice are 96 KiB; 8 warps hold 64 fp32 sums a thread, 4 would leave the epilogue too little.
_MATRIX_UNIT = Product(128, 128, 64, num_warps=8, num_stages=3)
# Rows that are not read 16 bytes at a time cost an address and a mask for each element.
_MATRIX_UNIT_UNALIGNED = Product(64, 128, 32, num_warps=8, num_stages=3)
# 32 sums a thread. With 8 warps ptxas aims at 80 registers, for a third block on the chip, and spills two of them.
_MULTIPLY_ADD = Product(64, 64, 16, num_warps=4, num_stages=2)
# 64 KiB of local memory: one buffer of 32 KiB, while the next tile travels in registers.
_AMD = Product(128, 128, 64, num_warps=8, num_stages=2)
_AMD_UNALIGNED = Product(64, 128, 32, num_warps=8, num_stages=2)

# By chip, bytes of an element, and whether rows are read 16 bytes at a time.
PRODUCT = {
    ("sm_80", 2, True): _MATRIX_UNIT,
    ("sm_80", 2, False): _MATRIX_UNIT_UNALIGNED,
    ("sm_80", 4, True): _MULTIPLY_ADD,
    ("sm_80", 4, False): _MULTIPLY_ADD,
    ("sm_90", 2, True): _MATRIX_UNIT,
    ("sm_90", 2, False): _MATRIX_UNIT_UNALIGNED,
    ("sm_90", 4, True): _MULTIPLY_ADD,
    ("sm_90", 4, False): _MULTIPLY_ADD,
    ("hip", 2, True): _AMD,
    ("hip", 2, False): _AMD_UNALIGNED,
    ("hip", 4, True): _MULTIPLY_ADD,
    ("hip", 4, False): _MULTIPLY_ADD,
}

# A result of few rows (a class token, a classifier head) would leave half of a 128-row tile empty.
FEW_ROWS = 64



@dataclass(frozen=True)
class Partials:
    """The sum over partial results: BLOCK of its elements a program."""

    BLOCK: int
    num_warps: int


PARTIALS = Partials(1024, num_warps=4)

# Patch embedding, by chip, bytes of a number, and whether image and weight are read 16 bytes at a time: tiles from
# large to small. The first that occupies the whole chip is taken, the last if none does.
# Hopper reads both sides of a product from shared memory, which keeps up with 128 x 256 and not with 128 x 128.
_PATCHES_WIDE = Product(128, 256, 64, num_warps=8, num_stages=3)
_PATCHES_UNALIGNED = Product(128, 128, 32, num_warps=8, num_stages=3)
_PATCHES_SMALL = Product(64, 64, 64, num_warps=4, num_stages=3)
_PATCHES_FEW = Product(64, 32, 64, num_warps=4, num_stages=4)
_PATCHES_SMALL_UNALIGNED = Product(64, 64, 32, num_warps=4, num_stages=3)
_PATCHES_SMALL_FP32 = Product(32, 32, 16, num_warps=4, num_stages=2)
PATCHES = {
    ("sm_80", 2, True): (_MATRIX_UNIT, _PATCHES_SMALL),
    ("sm_80", 2, False): (_PATCHES_UNALIGNED, _PATCHES_SMALL_UNALIGNED),
    ("sm_90", 2, True): (_PATCHES_WIDE, _MATRIX_UNIT, _PATCHES_SMALL, _PATCHES_FEW),
    ("sm_90", 2, False): (_PATCHES_UNALIGNED, _PATCHES_SMALL_UNALIGNED),
    ("hip", 2, True): (_AMD, Product(64, 64, 64, num_warps=4, num_stages=2)),
    ("hip", 2, False): (_AMD_UNALIGNED, Product(64, 64, 32, num_warps=4, num_stages=2)),
    **dict.fromkeys(((chip, 4, True) for chip in CORES), (_MULTIPLY_ADD, _PATCHES_SMALL_FP32)),
    **dict.fromkeys(((chip, 4, False) for chip in CORES), (_MULTIPLY_ADD, _PATCHES_SMALL_FP32)),
}
# A byte becomes 16 bits in registers, and those of 64 at once spill beside the sums of the widest tile.
BYTE_DEPTH = 32
# A part of the weight's gradient sums at least this many patches: fewer would not pay for writing and reading it.
SPLIT_PATCHES = 256


@dataclass(frozen=True)
class TokenSum:
    """The sum over the images of a batch: BLOCK_M images of a token at once, so that enough loads are under way."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int


# 32 elements a thread are four loads of 16 bytes in 16 bits; 768 columns make three programs a token.
TOKEN_SUM = TokenSum(16, 256, num_warps=4)

# Attention, by chip, bytes of an element and padded head width: most keys of one pass (0: always in tiles), then
# queries and keys of a tile beyond it. A query's scores, their exponentials and its sums share a thread's registers, so
# a wide head leaves fewer keys. 256 hold ViT's 197: with 128 queries over 8 warps they fit sm_90, not sm_80.
SCORES = {
    ("sm_80", 2): {16: (128, 64, 64), 32: (128, 64, 64), 64: (128, 64, 64), 128: (0, 64, 32), 256: (0, 32, 32)},
    # Width 256 with 64 queries overflows Blackwell's tensor memory, and Triton then compiles the kernel to a trap.
    ("sm_90", 2): {16: (256, 64, 64), 32: (256, 64, 64), 64: (256, 64, 64), 128: (64, 64, 64), 256: (0, 32, 32)},
    ("hip", 2): {16: (128, 64, 64), 32: (128, 64, 64), 64: (64, 64, 64), 128: (0, 64, 32), 256: (0, 32, 32)},
    # Plain multiply-adds keep whole rows of q and k in registers.
    ("sm_80", 4): {16: (32, 32, 32), 32: (32, 32, 32), 64: (32, 32, 32), 128: (0, 16, 32), 256: (0, 16, 16)},
    ("sm_90", 4): {16: (32, 32, 32), 32: (32, 32, 32), 64: (32, 32, 32), 128: (0, 16, 32), 256: (0, 16, 16)},
    ("hip", 4): {16: (32, 32, 32), 32: (32, 32, 32), 64: (32, 32, 32), 128: (0, 16, 32), 256: (0, 16, 16)},
}
# Queries, keys and warps of a tile, by bytes of an element and padded head width, when each score also needs an address
# in the mask or each element of k and v one of its own; nothing is fetched ahead, for want of registers.
COSTLY_SCORES = {
    2: {16: (64, 32, 8), 32: (64, 32, 8), 64: (64, 32, 8), 128: (64, 32, 8), 256: (32, 32, 8)},
    4: {16: (32, 16, 4), 32: (32, 16, 4), 64: (32, 16, 4), 128: (16, 32, 8), 256: (16, 16, 4)},
}
MAX_HEAD_DIM = 256


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def rows(width: int) -> Rows:
    block_d = max(_power_of_two(width), 16) if width <= ROW_ELEMENTS else ROW_PIECE
    block_m = max(1, NARROW_ROW // block_d)
    # One warp per 512 columns keeps 16 values a thread, eight warps at most.
    warps = min(8, max(1, block_m * block_d // 512))
    return Rows(block_m, block_d, width <= block_d, num_warps=warps)


def product(chip: str, itemsize: int, row_count: int, aligned: bool) -> Product:
    tile = PRODUCT[chip, itemsize, aligned]
    if row_count > FEW_ROWS or tile.BLOCK_M <= FEW_ROWS:
        return tile
    return Product(FEW_ROWS, tile.BLOCK_N, tile.BLOCK_K, num_warps=4, num_stages=tile.num_stages)


def weight_product(
    chip: str, itemsize: int, row_count: int, width: int, depth: int, aligned: bool
) -> tuple[Product, int]:
    """Tile of a weight's gradient (width, depth), and into how many parts its sum over rows is split."""
    tile = PRODUCT[chip, itemsize, aligned]
    tiles = -(-width // tile.BLOCK_N) * -(-depth // tile.BLOCK_K)
    splits = max(1, min(132 // max(tiles, 1), row_count // 1024))
    return Product(32, tile.BLOCK_N, min(tile.BLOCK_M, 64), tile.num_warps, tile.num_stages), splits


def scores(chip: str, itemsize: int, head_dim: int, key_count: int, masked: bool, aligned: bool) -> Scores:
    block_e = max(_power_of_two(head_dim), 16)
    most_keys, block_m, block_n = SCORES[chip, itemsize][block_e]
    warps, stages = 4, 2
    if masked or not aligned:
        block_m, block_n, warps = COSTLY_SCORES[itemsize][block_e]
        most_keys, stages = min(most_keys, block_n), 1
    one_pass = key_count <= most_keys
    if one_pass:
        block_n = max(_power_of_two(key_count), 16)
        stages = 1
    if block_n > 128:
        block_m, warps = 128, 8
    return Scores(block_m, block_n, block_e, one_pass, warps, stages)


def patches(chip: str, itemsize: int, row_count: int, width: int, aligned: bool, of_bytes: bool = False) -> Product:
    tiles = PATCHES[chip, itemsize, aligned]
    tile = next((t for t in tiles if _tiles(t, row_count, width) >= CORES[chip]), tiles[-1])
    return replace(tile, BLOCK_K=min(tile.BLOCK_K, BYTE_DEPTH)) if of_bytes else tile


def patches_weight(
    chip: str, itemsize: int, row_count: int, width: int, depth: int, aligned: bool
) -> tuple[Product, int]:
    """Tile of the weight's gradient (width, depth), and into how many parts its sum over the rows is split."""
    tile = PATCHES[chip, itemsize, aligned][0]
    # The sums of so many programs fit the registers of a core.
    programs = CORES[chip] * max(1, _PATCHES_WIDE.BLOCK_M * _PATCHES_WIDE.BLOCK_N // (tile.BLOCK_M * tile.BLOCK_N))
    return tile, max(1, min(programs // _tiles(tile, width, depth), row_count // SPLIT_PATCHES))


def _tiles(tile: Product, row_count: int, width: int) -> int:
    return -(-row_count // tile.BLOCK_M) * -(-width // tile.BLOCK_N)


