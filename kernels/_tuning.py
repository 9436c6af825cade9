"""Every block size, warp count and stage count of the Triton kernels, as data, each with its reason.

Not tuned yet: the numbers are the largest round ones with which every kernel compiles for sm_80, sm_90, sm_100 and
gfx942 without a register spill and within 99 KiB of shared memory (64 KiB on AMD), so that consumer chips can too.
`tests/test_aot.py` holds them to that. Tables are keyed by chip (`_device.chip`) and by the bytes of an element:
four-byte operands go through plain multiply-adds on NVIDIA (`input_precision="ieee"`), not a matrix unit, and want
smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Rows:
    """Row-wise kernels: BLOCK_M rows of BLOCK_D columns; ONE_TILE says that a whole row fits."""

    BLOCK_M: int
    BLOCK_D: int
    ONE_TILE: bool
    num_warps: int


@dataclass(frozen=True)
class NormBackward:
    """LayerNorm's backward: a program walks tiles of BLOCK_M whole rows; while it works on one, STAGES - 1 are on their
    way. SUMS rows of a tile lie in different warps, and have sums of their own until the end."""

    BLOCK_M: int
    BLOCK_D: int
    SUMS: int
    STAGES: int
    num_warps: int


@dataclass(frozen=True)
class Piece:
    """A row too wide for a tile, walked in pieces of BLOCK_D columns."""

    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class Band:
    """Sums down a band of BLOCK_D columns, BLOCK_M rows at a time."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class PartialRows:
    """The sum of the programs' partial sums: BLOCK_P programs by BLOCK_D columns at a time."""

    BLOCK_P: int
    BLOCK_D: int
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
class FusedMlp:
    """norm_mlp in one kernel: BLOCK_M rows, in PIECES of BLOCK_D columns (the last of LAST_D), BLOCK_F hidden ones."""

    BLOCK_M: int
    BLOCK_D: int
    LAST_D: int
    PIECES: int
    BLOCK_F: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Elements:
    """Element-wise kernels: BLOCK_M rows by BLOCK_D columns a program."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class Fold:
    """LayerNorm's weight folded into a matrix: BLOCK_N of its rows a program, BLOCK_D columns at a time."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class Scores:
    """Attention: BLOCK_M queries against BLOCK_N keys at a time, and the keys left over in PIECES.

    ONE_PASS says that PIECES are all keys; the first FULL of them have no key to mask out. A head's width is cut into
    WIDTHS. A program takes ROW_TILES tiles of queries of HEADS heads.
    """

    BLOCK_M: int
    ROW_TILES: int
    HEADS: int
    TILE: tuple[int]
    PIECES: tuple[int, ...]
    FULL: int
    WIDTHS: tuple[int, ...]
    ONE_PASS: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ScoreGradients:
    """Attention's backward for a block of keys, PIECES, or in ONE_PASS for all of them: BLOCK_M queries at a time."""

    BLOCK_M: int
    PIECES: tuple[int, ...]
    FULL: int
    WIDTHS: tuple[int, ...]
    ONE_PASS: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class QueryGradients:
    """Attention's backward for BLOCK_M queries, where the keys do not fit: as in Scores."""

    BLOCK_M: int
    TILE: tuple[int]
    PIECES: tuple[int, ...]
    FULL: int
    WIDTHS: tuple[int, ...]
    num_warps: int
    num_stages: int


# Rows up to this width are held whole: 8192 fp32 over 8 warps are 32 registers a thread, and three blocks live.
ROW_ELEMENTS = 8192
# A row wider than that is walked in pieces; with pieces of 8192 the address masks of an odd width spill on gfx942.
ROW_PIECE = 4096
# LayerNorm's forward reads and writes 0.31 ns worth of memory per row of 768 in 16 bits and multiprocessor of an H200,
# about 180 cycles of its four schedulers, so what counts is instructions per row. One warp per 1024 columns needs no
# exchange between warps (3 sums of 5 steps a row and warp), and two rows a warp share what weight and bias cost: 480
# instructions a row, against 690 with four warps to a row of a four-row tile. 64 values a thread are 128 bytes on their
# way per tensor, 16 warps of them 48 KB a multiprocessor; 4.3 TB/s at 600 ns of latency want 20. fp32 has half the
# values in as many bytes, and one row.
ROW_WARP_BYTES = 4096
# Below this many rows most schedulers would have nothing to do: a row gets a program, and a thread 8 of its values.
FEW_NORM_ROWS = 2048

# LayerNorm's backward holds rows up to this width whole: 16 values a thread of up to four tensors and three sums of
# parameters are 168 registers, three programs of 4 warps a multiprocessor.
NORM_BACKWARD_ELEMENTS = 4096
# 20 KB on their way again: two tensors of 3 KB (768 columns, two rows) in four programs are 24 KB per stage in 16 bits.
NORM_BACKWARD_STAGES = {2: 3, 4: 2}
# Warps of a multiprocessor that run at once, by whether x, LayerScale and their sums take registers too: up to 128
# registers a thread, or 168. More programs than run at once would cost a second round, fewer hide less.
NORM_BACKWARD_WARPS = {False: 16, True: 12}
NORM_BACKWARD_PIECE = Piece(4096, num_warps=8)
# 16 values a thread; bands of 128 columns are read in lines of 256 bytes in 16 bits.
NORM_BACKWARD_BAND = Band(16, 128, num_warps=4)
# A multiprocessor has up to four programs, so 528 lines of partial sums on an H200: two steps, every load of a step on
# its way at once; 16 columns give 48 programs to each parameter of 768. A small batch has few lines.
PARTIAL_ROWS = PartialRows(512, 16, num_warps=8)
FEW_PARTIAL_ROWS = PartialRows(64, 128, num_warps=8)

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
# With 64 x 64 over 4 warps ptxas aims at 96 registers, for a fifth block on the chip, and spills two of them.
_PATCHES_FP32 = Product(128, 64, 16, num_warps=8, num_stages=2)
_PATCHES_SMALL_FP32 = Product(32, 32, 16, num_warps=4, num_stages=2)
PATCHES = {
    ("sm_80", 2, True): (_MATRIX_UNIT, _PATCHES_SMALL),
    ("sm_80", 2, False): (_PATCHES_UNALIGNED, _PATCHES_SMALL_UNALIGNED),
    ("sm_90", 2, True): (_PATCHES_WIDE, _MATRIX_UNIT, _PATCHES_SMALL, _PATCHES_FEW),
    ("sm_90", 2, False): (_PATCHES_UNALIGNED, _PATCHES_SMALL_UNALIGNED),
    ("hip", 2, True): (_AMD, Product(64, 64, 64, num_warps=4, num_stages=2)),
    ("hip", 2, False): (_AMD_UNALIGNED, Product(64, 64, 32, num_warps=4, num_stages=2)),
    **dict.fromkeys(((chip, 4, True) for chip in CORES), (_PATCHES_FP32, _PATCHES_SMALL_FP32)),
    **dict.fromkeys(((chip, 4, False) for chip in CORES), (_PATCHES_FP32, _PATCHES_SMALL_FP32)),
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

# norm_mlp in one kernel, by chip: rows of up to so many columns take BLOCK_M, BLOCK_F, warps and stages. Two stages
# hide the weights' way; 128 rows halve their traffic from L2, but only 192 columns leave 8 warps the registers for it.
# The table ends where shared memory does: 384 columns take 148 KiB.
FUSED_MLP = {
    "sm_80": {128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    "sm_90": {192: (128, 64, 8, 2), 384: (64, 32, 8, 2)},
    "hip": {384: (64, 32, 8, 1)},
}
# The widest row for which one kernel is taken. By arithmetic, for an H200 and ViT's 50,432 rows at batch 256: with 192
# columns two products need 54 us for memory alone, 36 of them for hidden activations, and 38 us to multiply, so one
# kernel should win. With 384 they need 151 us to multiply, behind which the 72 us for hidden activations hide, while
# one kernel (64 rows, or its sums spill) reads 1.9 GB of weights from L2, 270 us at 7 TB/s. Not measured yet.
FUSED_MLP_WIDTH = 256
# Each tile walks all weights: fewer tiles than cores would leave cores idle.
FUSED_MLP_WAVES = 1

# Folding LayerNorm's weight into fc1 reads and writes the matrix once, and may cost this share of what the product
# moves. It saves the pass through registers of all that the product reads, which keeps copies from running ahead.
FOLD_SHARE = 0.25
# 2048 elements are 8 a thread: a row of ViT in a few steps, and enough programs for every core.
FOLD = Fold(4, 512, num_warps=8)
# Four loads of 16 bytes a thread in 16 bits.
ELEMENTS = 4096
# What a weight's gradient reads is made once, not on every load, if more than so many tiles of it load it. On an H200
# the way to memory and back takes 0.9 ps an element, GELU (20-30 instructions) about as long and LayerNorm (6) 0.2 ps.
ACTIVATE_ONCE = 1
NORMALISE_ONCE = 4


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def rows(width: int, itemsize: int = 4, row_count: int | None = None) -> Rows:
    block_d = max(_power_of_two(width), 16) if width <= ROW_ELEMENTS else ROW_PIECE
    if row_count is not None and row_count <= FEW_NORM_ROWS:
        block_m = max(1, 256 // block_d)
        return Rows(block_m, block_d, width <= block_d, num_warps=min(8, block_m * block_d // 256))
    warps = max(1, block_d // 1024)
    block_m = max(1, warps * ROW_WARP_BYTES // (block_d * itemsize))
    return Rows(block_m, block_d, width <= block_d, num_warps=warps)


def norm_backward(itemsize: int, width: int, scaled: bool) -> tuple[NormBackward, int]:
    """Tile of LayerNorm's backward, and how many programs each multiprocessor runs."""
    block_d = max(_power_of_two(width), 16)
    warps = max(4, block_d // 512)
    block_m, sums, stages = max(1, 2048 // block_d), max(1, 1024 // block_d), NORM_BACKWARD_STAGES[itemsize]
    return NormBackward(block_m, block_d, sums, stages, num_warps=warps), NORM_BACKWARD_WARPS[scaled] // warps


def partial_rows(line_count: int) -> PartialRows:
    return FEW_PARTIAL_ROWS if line_count <= FEW_PARTIAL_ROWS.BLOCK_P else PARTIAL_ROWS


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


def widths(head_dim: int) -> tuple[int, ...]:
    """One or two powers of two that hold a head's columns: 80 are 64 and 16."""
    whole = max(_power_of_two(head_dim), 16)
    first = whole // 2
    rest = max(_power_of_two(head_dim - first), 16)
    return (first, rest) if first >= 16 and first + rest < whole else (whole,)


def pieces(keys: int) -> tuple[int, ...]:
    """At most three powers of two, 16 or more, that hold so many keys: 197 are 128, 64 and 16."""
    sizes: list[int] = []
    while keys > 0 and len(sizes) < 3:
        size = max(_power_of_two(keys), 16)
        if size > 16 and len(sizes) < 2 and size > keys:
            size //= 2
        sizes.append(size)
        keys -= size
    whole = _power_of_two(sum(sizes))
    return (whole,) if sum(sizes) == whole else tuple(sizes)


def _tail(keys: int, block_n: int, ragged: bool) -> tuple[tuple[int, ...], int]:
    """The pieces of the keys that full tiles leave over, and how many of them are full."""
    left = (block_n,) if ragged else pieces(keys % block_n)
    return left, 0 if ragged else max(len(left) - 1, 0)


def scores(chip: str, itemsize: int, head_dim: int, call: Any) -> Scores:
    width = max(_power_of_two(head_dim), 16)
    most_keys, block_m, block_n = SCORES[chip, itemsize][width]
    warps, stages = 4, 2
    if not call.lean:
        block_m, block_n, warps = COSTLY_SCORES[itemsize][width]
        most_keys, stages = min(most_keys, block_n), 1
    one_pass = call.keys <= most_keys
    if one_pass:
        left = pieces(call.keys) or (16,)
        full = 0 if call.ragged else len(left) - 1
    else:
        left, full = _tail(call.keys, block_n, call.ragged)
    tiles = 1
    if one_pass:
        tiles = -(-call.rows // block_m)
    return Scores(block_m, tiles, 1, (block_n,), left, full, widths(head_dim), one_pass, warps, stages)


def score_gradients(chip: str, itemsize: int, head_dim: int, call: Any) -> ScoreGradients:
    most_keys, block_m, block_n, warps, stages = 256, 32, 64, 8, 1
    if itemsize == 4 or not call.lean:
        most_keys, block_m, block_n, warps, stages = 32, 32, 32, 4, 1
    left = pieces(call.keys)
    if call.keys <= most_keys:
        return ScoreGradients(block_m, left, 0 if call.ragged else len(left) - 1, widths(head_dim), True, warps, stages)
    return ScoreGradients(block_m, (block_n,), 0, widths(head_dim), False, warps, stages)


def score_gradients_of_queries(chip: str, itemsize: int, head_dim: int, call: Any) -> QueryGradients:
    block_m, block_n, warps, stages = 64, 64, 4, 2
    if itemsize == 4 or not call.lean:
        block_m, block_n, warps, stages = 32, 32, 4, 1
    left, full = _tail(call.keys, block_n, call.ragged)
    return QueryGradients(block_m, (block_n,), left, full, widths(head_dim), warps, stages)

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


def fused_mlp(chip: str, itemsize: int, row_count: int, width: int, hidden: int) -> FusedMlp | None:
    """Tile of norm_mlp in one kernel, or None where two products are the better way, or the only one."""
    most = next((most for most in FUSED_MLP[chip] if width <= min(most, FUSED_MLP_WIDTH)), None)
    # Multiply-adds in fp32 take so long that the hidden activations' traffic does not show.
    if itemsize != 2 or most is None:
        return None
    block_m, block_f, warps, stages = FUSED_MLP[chip][most]
    count = -(-width // 128)
    last = max(_power_of_two(width - 128 * (count - 1)), 16)
    if row_count < FUSED_MLP_WAVES * block_m * CORES[chip] or width != 128 * (count - 1) + last or hidden % block_f:
        return None
    return FusedMlp(block_m, 128 if count > 1 else last, last, count, block_f, num_warps=warps, num_stages=stages)


def folds(row_count: int, hidden: int, width: int) -> bool:
    """Whether LayerNorm's weight is worth folding into fc1 (hidden, width) for this many rows."""
    return 0 < 2 * hidden * width <= FOLD_SHARE * row_count * (hidden + width)


def made_once(columns: int, most_tiles: int) -> bool:
    """Whether the tiles of a weight's gradient along these columns are more than most_tiles."""
    return columns > 128 * most_tiles


def elements(width: int) -> Elements:
    block_d = min(max(_power_of_two(width), 16), 1024)
    return Elements(ELEMENTS // block_d, block_d, num_warps=4)
