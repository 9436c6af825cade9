"""Every block size, warp count and stage count of the Triton kernels, as data, each with its reason.

Not tuned yet: the numbers are the largest round ones with which every kernel compiles for sm_80, sm_90, sm_100 and
gfx942 without a register spill and within 99 KiB of shared memory (64 KiB on AMD), so that consumer chips can too.
`tests/test_aot.py` holds them to that. Tables are keyed by chip (`_device.chip`) and by the bytes of an element:
four-byte operands go through plain multiply-adds on NVIDIA (`input_precision="ieee"`), not a matrix unit, and want
smaller tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _tuning_matmul
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
# Below this many rows most schedulers would have nothing to do: a row gets a program, and a thread 8 of its values. So
# it is with rows that are not read 16 bytes at a time: 64 values a thread with an address each spill.
FEW_NORM_ROWS = 2048

# LayerNorm's backward holds rows up to this width whole, 16 values a thread of each tensor.
NORM_BACKWARD_ELEMENTS = 4096
# 20 KB on their way again: two tensors of 3 KB (768 columns, two rows) in four programs are 24 KB a stage in 16 bits.
NORM_BACKWARD_STAGES = {2: 3, 4: 2}
# Columns of a warp, by whether x, LayerScale and its sum need registers too. Half as many warps a row are 1380
# instructions for 2048 columns instead of 1570, and with LayerScale they would spill.
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

# Programs that occupy every core of the largest chip that a key stands for.
CORES = {"sm_80": 108, "sm_90": 132, "hip": 304}

# Row tiles that share a band of the weight are launched next to one another, so that the band stays in the L2 cache.
GROUP_M = 8

# Attention, by chip, bytes of an element and padded head width, where a score needs nothing but its product. First, all
# keys in one pass: how many at most, queries, warps, stages; then tiles beyond: queries, keys, warps, stages. Scores,
# weights and sums of a query share a thread's registers: 208 keys (ViT's 197 and 201) take 189 of them on sm_90 and fit
# sm_100, 272 (257) spill. Four warps are one warp group with 64 queries; two or three such programs share a core.
_SCORES_80 = {64: ((128, 64, 4, 2), (128, 64, 8, 3)), 128: ((64, 64, 4, 2), (64, 32, 4, 2)), 256: (None, (32, 32, 4, 2))}
_SCORES_90 = {
    64: ((208, 64, 4, 2), (128, 64, 8, 3)),
    128: ((128, 64, 4, 2), (128, 64, 8, 3)),
    # With 128 queries it overflows Blackwell's tensor memory, and Triton then compiles the kernel to a trap.
    256: ((128, 128, 8, 2), (64, 32, 4, 2)),
}
_SCORES_AMD = {64: ((64, 64, 4, 2), (64, 64, 4, 2)), 128: (None, (64, 32, 4, 2)), 256: (None, (32, 32, 4, 2))}
# Plain multiply-adds keep whole rows of q and k in registers.
_SCORES_FP32 = {64: ((32, 32, 4, 1), (32, 32, 4, 2)), 128: (None, (16, 32, 4, 2)), 256: (None, (16, 16, 4, 2))}
SCORES = {
    ("sm_80", 2): _SCORES_80,
    ("sm_90", 2): _SCORES_90,
    ("hip", 2): _SCORES_AMD,
    **dict.fromkeys((("sm_80", 4), ("sm_90", 4), ("hip", 4)), _SCORES_FP32),
}
# The norm of queries and keys keeps their one pass where it fits: it costs its own registers only before the scores.
NORMED_SCORES = {("sm_90", 2): {64: (208, 64, 4, 1)}}
# Queries, keys and warps of a tile, by bytes of an element and padded head width, when each score also needs an address
# in the mask or a random number, or each element of k and v an address of its own; nothing is fetched ahead.
COSTLY_SCORES = {
    2: {64: (64, 32, 8), 128: (64, 32, 8), 256: (32, 32, 8)},
    4: {64: (32, 16, 4), 128: (16, 32, 8), 256: (16, 16, 4)},
}

# Attention's backward: choices for one pass, the smallest first: pieces of the keys, queries, warps, stages; then for a
# block of keys: keys, queries, warps, stages; and for a block of queries: queries, keys, warps, stages. The sums for
# dK and dV of 256 keys fill half of the registers of 8 warps. Pieces of 128 keys are 64 for each warp group; a smaller
# one would split its columns between the groups, and its weights would travel through shared memory.
_GRADIENTS_80 = {
    64: ([((64,), 32, 4, 2), ((128,), 32, 8, 2)], (128, 64, 8, 2), (64, 64, 4, 2)),
    128: ([((64,), 16, 4, 1)], (128, 32, 8, 2), (32, 32, 8, 1)),
    256: ([], (32, 32, 8, 1), (32, 16, 8, 1)),
}
_GRADIENTS_90 = {
    64: ([((64,), 32, 4, 2), ((128,), 64, 8, 2), ((128, 128), 32, 8, 2)], (128, 64, 8, 2), (64, 64, 4, 2)),
    128: ([((64,), 32, 8, 1), ((128,), 32, 8, 1)], (128, 32, 8, 2), (64, 64, 4, 2)),
    256: ([], (32, 32, 8, 1), (64, 64, 8, 2)),
}
_GRADIENTS_AMD = {
    64: ([((64,), 32, 4, 2), ((128,), 32, 8, 1)], (64, 32, 8, 1), (64, 32, 8, 1)),
    128: ([], (32, 32, 8, 1), (32, 32, 8, 1)),
    256: ([], (16, 16, 4, 1), (16, 16, 4, 1)),
}
_GRADIENTS_FP32 = {
    64: ([((32,), 32, 4, 1)], (32, 32, 4, 1), (32, 32, 4, 1)),
    128: ([], (16, 32, 8, 1), (16, 32, 8, 1)),
    256: ([], (16, 16, 8, 1), (16, 16, 8, 1)),
}
GRADIENTS = {
    ("sm_80", 2): _GRADIENTS_80,
    ("sm_90", 2): _GRADIENTS_90,
    ("hip", 2): _GRADIENTS_AMD,
    **dict.fromkeys((("sm_80", 4), ("sm_90", 4), ("hip", 4)), _GRADIENTS_FP32),
}
# As COSTLY_SCORES; both kernels, and one pass where the keys fit one tile.
COSTLY_GRADIENTS = {
    2: {64: (32, 32, 8), 128: (32, 32, 8), 256: (16, 16, 4)},
    4: {64: (32, 16, 4), 128: (16, 16, 4), 256: (16, 16, 8)},
}
# Fewer heads than that for each core: a program takes one tile of queries instead of all of a head.
FEW_HEADS = 2
# Heads of one tile of queries that a program takes one after the other, fetching the next while it computes, when there
# are many programs for each core anyway.
HEADS = 4
MANY_HEADS = 16
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


def rows(width: int, itemsize: int = 4, row_count: int | None = None, aligned: bool = True) -> Rows:
    block_d = max(_power_of_two(width), 16) if width <= ROW_ELEMENTS else ROW_PIECE
    if not aligned or (row_count is not None and row_count <= FEW_NORM_ROWS):
        block_m = max(1, 256 // block_d)
        return Rows(block_m, block_d, width <= block_d, num_warps=min(8, block_m * block_d // 256))
    warps = max(1, block_d // 1024)
    block_m = max(1, warps * ROW_WARP_BYTES // (block_d * itemsize))
    return Rows(block_m, block_d, width <= block_d, num_warps=warps)


def norm_backward(itemsize: int, width: int, scaled: bool) -> tuple[NormBackward, int]:
    """Tile of LayerNorm's backward, and how many programs each multiprocessor runs."""
    block_d = max(_power_of_two(width), 16)
    warps = max(4, block_d // NORM_BACKWARD_COLUMNS[scaled])
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


def _full(left: tuple[int, ...], keys: int, ragged: bool) -> int:
    """How many of the pieces hold nothing but keys, in every sequence."""
    return 0 if ragged else sum(sum(left[: i + 1]) <= keys for i in range(len(left)))


def _tail(keys: int, block_n: int, ragged: bool) -> tuple[tuple[int, ...], int]:
    """The pieces of the keys that full tiles leave over, and how many of them are full."""
    left = (block_n,) if ragged else pieces(keys % block_n)
    return left, _full(left, keys % block_n, ragged)


def scores(chip: str, itemsize: int, head_dim: int, call: Any) -> Scores:
    width = max(_power_of_two(head_dim), 64)
    one, tiled = SCORES[chip, itemsize][width]
    if call.kind != "lean":
        block_m, block_n, warps = COSTLY_SCORES[itemsize][width]
        one, tiled = (block_n, block_m, warps, 1), (block_m, block_n, warps, 1)
    if call.kind == "norm":
        one = NORMED_SCORES.get((chip, itemsize), {}).get(width, one)
    if one is None or call.keys > one[0]:
        block_m, block_n, warps, stages = tiled
        if block_m == 128 and (call.rows - 1) % 128 < 64:  # the second half of the last tile would be empty
            block_m, warps = 64, warps // 2
        left, full = _tail(call.keys, block_n, call.ragged)
        return Scores(block_m, 1, 1, (block_n,), left, full, widths(head_dim), False, warps, stages)
    _, block_m, warps, stages = one
    left = pieces(call.keys) or (16,)
    tiles = -(-call.rows // block_m)
    if call.heads < FEW_HEADS * CORES[chip]:
        tiles = 1  # K and V are read once for each, and more cores take part
    heads = 1
    if call.kind == "lean" and call.rows <= block_m and call.heads % HEADS == 0 and call.heads >= MANY_HEADS * CORES[chip]:
        heads = HEADS
    return Scores(
        *(block_m, tiles, heads, (tiled[1],), left, _full(left, call.keys, call.ragged), widths(head_dim), True),
        *(warps, stages),
    )


def score_gradients(chip: str, itemsize: int, head_dim: int, call: Any) -> ScoreGradients:
    width = max(_power_of_two(head_dim), 64)
    one, beyond, _ = GRADIENTS[chip, itemsize][width]
    if call.kind != "lean":
        block_m, block_n, warps = COSTLY_GRADIENTS[itemsize][width]
        one, beyond = [((block_n,), block_m, warps, 1)], (block_n, block_m, warps, 1)
    for left, block_m, warps, stages in one:
        if call.keys <= sum(left):
            full = _full(left, call.keys, call.ragged)
            return ScoreGradients(block_m, left, full, widths(head_dim), True, warps, stages)
    block_n, block_m, warps, stages = beyond
    return ScoreGradients(block_m, (block_n,), 0, widths(head_dim), False, warps, stages)


def score_gradients_of_queries(chip: str, itemsize: int, head_dim: int, call: Any) -> QueryGradients:
    width = max(_power_of_two(head_dim), 64)
    block_m, block_n, warps, stages = GRADIENTS[chip, itemsize][width][2]
    if call.kind != "lean":
        block_m, block_n, warps = COSTLY_GRADIENTS[itemsize][width]
        stages = 1
    left, full = _tail(call.keys, block_n, call.ragged)
    return QueryGradients(block_m, (block_n,), left, full, widths(head_dim), warps, stages)


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
