"""Every block size, warp count and stage count of the Triton kernels, as data, each with its reason.

Not tuned yet: the numbers are the largest round ones with which every kernel compiles for sm_80, sm_90, sm_100 and
gfx942 without a register spill, those of the key sm_80 within 99 KiB of shared memory, so that consumer chips can too.
`tests/test_aot.py` holds them to that. Tables are keyed by chip (`_device.chip`) and by the bytes of an element:
four-byte operands go through plain multiply-adds on NVIDIA (`input_precision="ieee"`), not a matrix unit, and want
smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import _tuning_matmul
from ._tuning_attention import (
    MAX_HEAD_DIM as MAX_HEAD_DIM,
    MAX_NORMED_HEAD_DIM as MAX_NORMED_HEAD_DIM,
    _tail as _tail,
    score_gradients as score_gradients,
    score_gradients_of_queries as score_gradients_of_queries,
    scores as scores,
)
from ._tuning_matmul import (
    EPILOGUE,
    EPILOGUE_PROGRAMS,
    LIBRARY,
    WEIGHT_SUM as WEIGHT_SUM,
    Epilogue,
    MatMul,
    MatMulWeight,
)


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
class Maps:
    """GroupNorm: a group is walked in tiles of BLOCK_C channels by BLOCK_P positions."""

    BLOCK_C: int
    BLOCK_P: int
    num_warps: int


@dataclass(frozen=True)
class Fold:
    """LayerNorm's weight folded into a matrix: BLOCK_N of its rows a program, BLOCK_D columns at a time."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int


# Rows up to this width are held whole: 8192 fp32 over 8 warps are 32 registers a thread, and three blocks live.
ROW_ELEMENTS = 8192
# A row wider than that is walked in pieces; with pieces of 4096 the address masks of an odd width spill on sm_80.
ROW_PIECE = 2048
# LayerNorm's forward moves 3 KB for a row of 768 in 16 bits: 94 ns of a multiprocessor's share of an H200's memory, in
# which its four schedulers issue some 680 instructions, so that those count. One warp per 1024 columns needs no
# exchange between warps (three sums of five steps a row and warp), and two rows a warp share what weight and bias cost:
# 480 instructions a row (SASS for sm_90), against 690 with four warps across the rows. 64 values a thread are 128 bytes
# on their way per tensor, 16 warps of them 48 KB a multiprocessor, where 600 ns of latency want 20. fp32 has half as
# many values in as many bytes, and one row.
ROW_WARP_BYTES = 4096
# Below this many rows most schedulers would have nothing to do: a row gets a program, and a thread 8 of its values. So
# it is with rows that are not read 16 bytes at a time: 64 values a thread with an address each spill.
FEW_NORM_ROWS = 2048

# LayerNorm's backward holds rows up to this width whole, 16 values a thread of each tensor.
NORM_BACKWARD_ELEMENTS = 4096
# 20 KB on their way again: two tensors of 3 KB (768 columns, two rows) in four programs are 24 KB a stage in 16 bits.
NORM_BACKWARD_STAGES = {2: 3, 4: 2}
# Columns of a warp, by whether x, LayerScale and its sum need registers too, where rows are wide. A row of 1280 in 16
# bits is worth 1700 instructions of memory time: four warps take 1380 for its 2048 columns, eight 1570. With LayerScale
# there is twice the time, and four warps would spill. (768 columns: 770 of 1020, with LayerScale 1200 of 2030.)
NORM_BACKWARD_COLUMNS = {False: 512, True: 256}
# Warps of a multiprocessor that run at once, by the bytes of an element: 128 or 168 registers a thread. More programs
# than run at once would cost a second round.
NORM_BACKWARD_WARPS = {2: 16, 4: 12}
NORM_BACKWARD_PIECE = Piece(4096, num_warps=8)
# 8 values a thread, or an odd width spills; bands of 128 columns are read in lines of 256 bytes in 16 bits.
NORM_BACKWARD_BAND = Band(16, 128, num_warps=8)
# A multiprocessor has up to four programs, so 528 lines of partial sums on an H200: two steps, every load of a step on
# its way at once; 16 columns give 48 programs to each parameter of 768. A small batch has few lines.
PARTIAL_ROWS = PartialRows(512, 16, num_warps=8)
FEW_PARTIAL_ROWS = PartialRows(64, 128, num_warps=8)

# 16 values a thread of each tensor in 8 warps: both passes of GroupNorm's backward hold four tiles in fp32, 64
# registers. A tile of one channel is read in lines of 8 KB in 16 bits.
MAPS_ELEMENTS = 4096

# Programs that occupy every core of the largest chip that a key stands for.
CORES = {"sm_80": 108, "sm_90": 132, "hip": 304}

# Row tiles that share a band of the weight are launched next to one another, so that the band stays in the L2 cache.
GROUP_M = 8

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


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def rows(width: int, itemsize: int = 4, row_count: int | None = None, aligned: bool = True) -> Rows:
    block_d = max(_power_of_two(width), 16) if width <= ROW_ELEMENTS else ROW_PIECE
    if not aligned or width > block_d or (row_count is not None and row_count <= FEW_NORM_ROWS):
        block_m = max(1, 256 // block_d)
        return Rows(block_m, block_d, width <= block_d, num_warps=min(8, block_m * block_d // 256))
    warps = max(1, block_d // 1024)
    block_m = max(1, warps * ROW_WARP_BYTES // (block_d * itemsize))
    return Rows(block_m, block_d, width <= block_d, num_warps=warps)


def norm_backward(itemsize: int, width: int, scaled: bool) -> tuple[NormBackward, int]:
    """Tile of LayerNorm's backward, and how many programs each multiprocessor runs."""
    block_d = max(_power_of_two(width), 16)
    warps = min(8, max(4, block_d // NORM_BACKWARD_COLUMNS[scaled]))  # 16 leave a thread of gfx942 128 registers
    # A warp's loads of 16 bytes reach over 256 columns in 16 bits.
    sums = max(1, warps * 256 // block_d)
    tile = NormBackward(warps * 512 // block_d, block_d, sums, NORM_BACKWARD_STAGES[itemsize], num_warps=warps)
    return tile, max(1, NORM_BACKWARD_WARPS[itemsize] // warps)


def partial_rows(line_count: int) -> PartialRows:
    return FEW_PARTIAL_ROWS if line_count <= FEW_PARTIAL_ROWS.BLOCK_P else PARTIAL_ROWS


def matmul(chip: str, itemsize: int, row_count: int, width: int, depth: int, aligned: bool) -> tuple[MatMul, int]:
    """Tile of a product (row_count, width), and into how many parts its sum over depth is split."""
    return _tuning_matmul.quickest(False, chip, itemsize, aligned, CORES[chip], row_count, width, depth)


def matmul_weight(
    chip: str, itemsize: int, row_count: int, width: int, depth: int, aligned: bool
) -> tuple[MatMulWeight, int]:
    """Tile of a weight's gradient (width, depth), and into how many parts its sum over the rows is split."""
    return _tuning_matmul.quickest(True, chip, itemsize, aligned, CORES[chip], width, depth, row_count)


def product_gradient(width: int, processors: int) -> tuple[Epilogue, int]:
    """Tile of linear's element-wise backward, and how many programs share the rows."""
    return EPILOGUE, max(1, EPILOGUE_PROGRAMS * processors // -(-width // EPILOGUE.BLOCK_N))


def library(kind: str, chip: str, itemsize: int, row_count: int, width: int, depth: int) -> bool:
    """Whether torch's library makes a product ("forward", "input" or "weight" gradient) faster than ours."""
    fewest = LIBRARY.get((kind, chip, itemsize))
    return fewest is not None and row_count * width * depth >= fewest


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


def elements(width: int) -> Elements:
    block_d = min(max(_power_of_two(width), 16), 1024)
    return Elements(ELEMENTS // block_d, block_d, num_warps=4)


def maps(channels: int, positions: int) -> Maps:
    """Tile of GroupNorm for groups of so many channels and positions."""
    block_p = min(max(_power_of_two(positions), 16), MAPS_ELEMENTS)
    block_c = min(_power_of_two(channels), MAPS_ELEMENTS // block_p)
    return Maps(block_c, block_p, num_warps=min(8, max(1, block_c * block_p // 512)))
