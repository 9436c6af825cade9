"""The tiles of attention, forward and backward. Asked through `_tuning`, like every other choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


# Attention, by chip, bytes of an element and padded head width, where a score needs nothing but its product. First, all
# keys in one pass: how many at most, queries, warps, stages; then tiles beyond: queries, keys, warps, stages. Scores,
# weights and sums of a query share a thread's registers: 208 keys (ViT's 197 and 201) take 189 of them on sm_90 and fit
# sm_100, 272 (257) spill. Four warps are one warp group with 64 queries; two or three such programs share a core.
_SCORES_80 = {
    64: ((128, 64, 4, 2), (128, 64, 8, 3)),
    128: ((64, 64, 4, 2), (64, 32, 8, 1)),
    256: (None, (16, 32, 8, 1)),
}
_SCORES_90 = {
    64: ((208, 64, 4, 2), (128, 64, 8, 3)),
    128: ((128, 64, 4, 2), (128, 64, 8, 2)),
    # With 128 queries it overflows Blackwell's tensor memory, and Triton then compiles the kernel to a trap.
    256: ((128, 128, 8, 2), (64, 32, 8, 2)),
}
_SCORES_AMD = {64: ((64, 64, 4, 2), (64, 64, 4, 2)), 128: (None, (64, 32, 4, 2)), 256: (None, (32, 32, 4, 2))}
# Plain multiply-adds keep the summed axis of their operands in registers, hence pieces of 32 columns (`widths`).
_SCORES_FP32 = {64: ((64, 32, 8, 1), (64, 64, 8, 1)), 128: (None, (64, 32, 8, 1)), 256: (None, (32, 16, 8, 1))}
# Eight warps of 64 threads would halve a thread's 512 registers, and spill.
_SCORES_FP32_AMD = {64: ((64, 64, 4, 1), (64, 64, 4, 1)), 128: (None, (64, 32, 4, 1)), 256: (None, (16, 16, 4, 1))}
SCORES = {
    ("sm_80", 2): _SCORES_80,
    ("sm_90", 2): _SCORES_90,
    ("hip", 2): _SCORES_AMD,
    **dict.fromkeys((("sm_80", 4), ("sm_90", 4)), _SCORES_FP32),
    ("hip", 4): _SCORES_FP32_AMD,
}
# The norm of queries and keys costs its registers before the scores: where this says so, only the stages change.
NORMED_STAGES = {("sm_90", 2, 64): 1}
# Queries, keys and warps of a tile, by chip, bytes of an element and padded head width, when each score also needs an
# address in the mask or a random number, or each element of k and v an address of its own; nothing is fetched ahead.
# In fp32 there are fewer than 64 queries: that many and a mask of bytes, and Blackwell takes its matrix unit in tf32.
_COSTLY_SCORES = {64: (64, 32, 8), 128: (64, 32, 8), 256: (16, 32, 8)}
_COSTLY_SCORES_FP32 = {64: (16, 32, 4), 128: (16, 16, 8), 256: (16, 32, 8)}
COSTLY_SCORES = {
    ("sm_80", 2): {64: (32, 32, 8), 128: (32, 32, 8), 256: (16, 32, 8)},
    **dict.fromkeys((("sm_90", 2), ("hip", 2)), _COSTLY_SCORES),
    **dict.fromkeys((("sm_80", 4), ("sm_90", 4)), _COSTLY_SCORES_FP32),
    ("hip", 4): {64: (32, 32, 4), 128: (32, 32, 4), 256: (16, 16, 4)},
}
# Where norms need another one.
COSTLY_NORMED_SCORES = {
    **dict.fromkeys((("sm_80", 2, 128), ("sm_90", 2, 128), ("hip", 2, 128)), (32, 16, 8)),
    **dict.fromkeys((("sm_80", 4, 128), ("sm_90", 4, 128)), (16, 64, 8)),
}
# Norms of wider heads are taken beside the kernel.
MAX_NORMED_HEAD_DIM = 128

# Attention's backward: choices for one pass, the smallest first: pieces of the keys, queries, warps, stages; then for a
# block of keys: keys, queries, warps, stages; and for a block of queries: queries, keys, warps, stages. The sums for
# dK and dV of 256 keys fill half of the registers of 8 warps. Pieces of 128 keys are 64 for each warp group; a smaller
# one would split its columns between the groups, and its weights would travel through shared memory.
_GRADIENTS_80 = {
    64: ([((64,), 32, 4, 2), ((128,), 32, 8, 2)], (128, 64, 8, 2), (64, 32, 4, 2)),
    128: ([((64,), 16, 4, 1)], (128, 32, 8, 2), (32, 32, 8, 1)),
    256: ([], (32, 32, 8, 1), (16, 16, 8, 1)),
}
_GRADIENTS_90 = {
    64: ([((64,), 32, 4, 2), ((128,), 64, 8, 2), ((128, 128), 32, 8, 2)], (128, 64, 8, 2), (64, 64, 4, 2)),
    128: ([((64,), 32, 8, 1), ((128,), 32, 8, 1)], (128, 32, 8, 2), (64, 64, 4, 2)),
    256: ([], (32, 32, 8, 1), (64, 64, 8, 2)),
}
_GRADIENTS_AMD = {
    64: ([((64,), 32, 4, 2), ((128,), 32, 8, 1)], (128, 32, 8, 2), (64, 64, 4, 2)),
    128: ([((64,), 32, 4, 2), ((128,), 16, 8, 1)], (64, 32, 4, 2), (64, 32, 4, 2)),
    256: ([], (16, 16, 4, 1), (32, 32, 4, 1)),
}
_GRADIENTS_FP32 = {
    64: ([((64,), 32, 8, 1)], (64, 64, 8, 1), (64, 64, 8, 1)),
    128: ([], (32, 16, 4, 1), (32, 16, 8, 1)),
    256: ([], (16, 16, 4, 1), (16, 16, 4, 1)),
}
_GRADIENTS_FP32_AMD = {
    64: ([((64,), 32, 4, 1)], (32, 64, 4, 1), (64, 64, 4, 1)),
    128: ([], (32, 16, 4, 1), (32, 16, 4, 1)),
    256: ([], (16, 16, 4, 1), (16, 16, 4, 1)),
}
GRADIENTS = {
    ("sm_80", 2): _GRADIENTS_80,
    ("sm_90", 2): _GRADIENTS_90,
    ("hip", 2): _GRADIENTS_AMD,
    **dict.fromkeys((("sm_80", 4), ("sm_90", 4)), _GRADIENTS_FP32),
    ("hip", 4): _GRADIENTS_FP32_AMD,
}
# As COSTLY_SCORES; for both kernels, and one pass where the keys fit one tile.
_COSTLY_GRADIENTS = {64: (32, 32, 8), 128: (32, 32, 8), 256: (16, 16, 8)}
_COSTLY_GRADIENTS_FP32 = {64: (16, 16, 4), 128: (32, 16, 8), 256: (16, 16, 4)}
COSTLY_GRADIENTS = {
    **dict.fromkeys((("sm_80", 2), ("sm_90", 2)), _COSTLY_GRADIENTS),
    ("hip", 2): {64: (32, 32, 8), 128: (32, 32, 4), 256: (16, 16, 8)},
    **dict.fromkeys((("sm_80", 4), ("sm_90", 4)), _COSTLY_GRADIENTS_FP32),
    ("hip", 4): {64: (32, 32, 4), 128: (32, 16, 4), 256: (16, 16, 4)},
}
COSTLY_NORMED_GRADIENTS = dict.fromkeys((("sm_80", 2, 128), ("sm_90", 2, 128), ("hip", 2, 128)), (16, 16, 8))

# Fewer heads than that for each core: a program takes one tile of queries instead of all of a head.
FEW_HEADS = 2
# Heads of one tile of queries that a program takes one after the other, fetching the next while it computes, when there
# are many programs for each core anyway.
HEADS = 4
MANY = 16
MAX_HEAD_DIM = 256


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def widths(head_dim: int, itemsize: int) -> tuple[int, ...]:
    """Powers of two that hold a head's columns: 80 are 64 and 16, with four bytes each 32, 32 and 16."""
    if itemsize == 4:
        whole, rest = divmod(head_dim, 32)
        return (32,) * whole + ((16,) if 0 < rest <= 16 else (32,) * bool(rest))
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


def _choice(lean: Any, costly: Any, normed: Any, chip: str, itemsize: int, head_dim: int, call: Any) -> Any:
    """The row of a lean table, or the one tile of what needs more than that."""
    width = max(_power_of_two(head_dim), 64)
    if not call.costly and (not call.norm or (chip, itemsize, width) in NORMED_STAGES):
        return lean[chip, itemsize][width], None
    tile = costly[chip, itemsize][width]
    return None, normed.get((chip, itemsize, width), tile) if call.norm else tile


def scores(chip: str, itemsize: int, head_dim: int, call: Any) -> Scores:
    lean, costly = _choice(SCORES, COSTLY_SCORES, COSTLY_NORMED_SCORES, chip, itemsize, head_dim, call)
    cut = widths(head_dim, itemsize)
    if costly:
        block_m, block_n, warps = costly
        one, tiled = (block_n, block_m, warps, 1), (block_m, block_n, warps, 1)
    else:
        one, tiled = lean
    if one is None or call.keys > one[0]:
        block_m, block_n, warps, stages = tiled
        if block_m == 128 and (call.rows - 1) % 128 < 64:  # the second half of the last tile would be empty
            block_m, warps = 64, warps // 2
        left, full = _tail(call.keys, block_n, call.ragged)
        return Scores(block_m, 1, 1, (block_n,), left, full, cut, False, warps, stages)
    _, block_m, warps, stages = one
    left = pieces(call.keys) or (16,)
    tiles = -(-call.rows // block_m)
    if call.heads < FEW_HEADS * call.cores:
        tiles = 1  # K and V are read once for each, and more cores take part
    heads = 1
    if call.norm and not costly:
        stages = NORMED_STAGES[chip, itemsize, 64]
    elif not costly and call.rows <= block_m and call.heads % HEADS == 0 and call.heads >= MANY * call.cores:
        heads = HEADS
    full = _full(left, call.keys, call.ragged)
    return Scores(block_m, tiles, heads, (tiled[1],), left, full, cut, True, warps, stages)


def score_gradients(chip: str, itemsize: int, head_dim: int, call: Any) -> ScoreGradients:
    lean, costly = _choice(GRADIENTS, COSTLY_GRADIENTS, COSTLY_NORMED_GRADIENTS, chip, itemsize, head_dim, call)
    cut = widths(head_dim, itemsize)
    if costly:
        block_m, block_n, warps = costly
        one, beyond = [((block_n,), block_m, warps, 1)], (block_n, block_m, warps, 1)
    else:
        one, beyond = lean[:2]
    for left, block_m, warps, stages in one:
        if call.keys <= sum(left) and (costly or not (call.norm or sum(cut) > head_dim)):
            full = _full(left, call.keys, call.ragged)
            return ScoreGradients(block_m, left, full, cut, True, warps, stages)
    block_n, block_m, warps, stages = beyond
    return ScoreGradients(block_m, (block_n,), 0, cut, False, warps, stages)


def score_gradients_of_queries(chip: str, itemsize: int, head_dim: int, call: Any) -> QueryGradients:
    lean, costly = _choice(GRADIENTS, COSTLY_GRADIENTS, COSTLY_NORMED_GRADIENTS, chip, itemsize, head_dim, call)
    block_m, block_n, warps, stages = (*costly, 1) if costly else lean[2]
    left, full = _tail(call.keys, block_n, call.ragged)
    return QueryGradients(block_m, (block_n,), left, full, widths(head_dim, itemsize), warps, stages)
