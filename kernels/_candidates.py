"""What may be tried instead of a choice of `_tuning`: its neighbours, and the one predicate for "legal here".

Works by the names of fields, so that a new kind of configuration needs nothing here. A choice is a configuration, or a
tuple of configurations and whole numbers such as the parts of a split sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from . import _tuning

# Shared memory that one program may take, by chip: that of the smallest chip a key stands for.
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "hip": 64 << 10}
# 255 registers a thread hold 128 sums beside addresses and operands; more spill.
NUMBERS_A_THREAD = 128
WARP = {"sm_80": 32, "sm_90": 32, "hip": 64}
SMALLEST_SIDE = 16  # of a tl.dot
# Fewest and most of a field; a block of anything has up to 8192.
RANGES = {"num_warps": (1, 16), "num_stages": (1, 6), "STAGES": (1, 6), "ROW_TILES": (1, 64), "HEADS": (1, 8)}
BLOCKS = (1, 8192)
# Given by the shape, and what follows from it: a padded width, the keys or columns that are left over.
FIXED = ("BLOCK_E", "WIDTHS", "LAST_D", "PIECES", "FULL", "TILE", "ONE_PASS", "ONE_TILE")

Config = Any  # a dataclass of _tuning


def neighbours(choice: Any, asked: Mapping[str, Any]) -> Iterator[Any]:
    """Every choice one step away: a field doubled or halved, or one more or less; a block together with the warps.

    Args:
        asked: what the chooser was asked, by the names of its parameters.
    """
    if isinstance(choice, tuple):
        for place, part in enumerate(choice):
            for changed in neighbours(part, asked):
                yield (*choice[:place], changed, *choice[place + 1 :])
    elif type(choice) is int:
        yield from (number for number in (choice // 2, choice * 2) if number)
    elif dataclasses.is_dataclass(choice):
        yield from _stepped(choice)
        yield from _cut_otherwise(choice, asked)


def _stepped(config: Config) -> Iterator[Config]:
    values = _fields(config)
    fixed = (*FIXED, "BLOCK_D") if "LAST_D" in values else FIXED
    free = [name for name, value in values.items() if type(value) is int and name not in fixed]
    for name in free:
        for up in (True, False):
            moved = {name: _step(name, values[name], up)}
            yield from _replaced(config, moved)
            if name.startswith("BLOCK") and "num_warps" in free:
                yield from _replaced(config, {**moved, "num_warps": _step("num_warps", values["num_warps"], up)})
            if name == "BLOCK_M" and "ROW_TILES" in free:  # the same rows in tiles of another size
                yield from _replaced(config, {**moved, "ROW_TILES": _step("ROW_TILES", values["ROW_TILES"], not up)})


def _cut_otherwise(config: Config, asked: Mapping[str, Any]) -> Iterator[Config]:
    """The keys of an attention in other pieces: two in one, one in two, or what other full tiles leave over."""
    values = _fields(config)
    cut = values.get("PIECES")
    if not isinstance(cut, tuple):
        return
    if values.get("ONE_PASS"):
        yield from (
            dataclasses.replace(config, PIECES=pieces, FULL=full) for pieces, full in _cuts(cut, values["FULL"])
        )
    elif "TILE" in values:
        (tile,), call = values["TILE"], asked["call"]
        for other in (tile * 2, tile // 2):
            left, full = _tuning._tail(call.keys, other, call.ragged)
            yield dataclasses.replace(config, TILE=(other,), PIECES=left, FULL=full)
    else:
        yield from (dataclasses.replace(config, PIECES=(other,)) for other in (cut[0] * 2, cut[0] // 2))


def _cuts(cut: tuple[int, ...], full: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Pieces that hold the same keys, and how many of them surely have none to mask out."""
    *first, last = cut
    if first:
        merged = (*first[:-1], 2 * max(first[-1], last))
        yield merged, min(full, len(merged) - 1)
    if last > SMALLEST_SIDE:
        yield (*first, last // 2, last // 2), full


def _replaced(config: Config, moved: dict[str, int]) -> Iterator[Config]:
    if all(fewest <= moved[name] <= most for name in moved for fewest, most in [RANGES.get(name, BLOCKS)]):
        yield dataclasses.replace(config, **moved)


def _step(name: str, value: int, up: bool) -> int:
    if "stages" in name.lower():
        return value + 1 if up else value - 1
    return value * 2 if up else value // 2


def _fields(config: Config) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def legal(choice: Any, chip: str, itemsize: int) -> str | None:
    """Why a choice cannot work on a chip with elements of itemsize bytes, by arithmetic alone, or None.

    The compiler has the last word, and the check of the result the very last.
    """
    for part in choice if isinstance(choice, tuple) else (choice,):
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            reason = _why_not(_fields(part), getattr(part, "SUMMED", "K"), chip, itemsize)
            if reason:
                return reason
    return None


def _why_not(values: dict[str, Any], summed: str, chip: str, itemsize: int) -> str | None:
    """Of one configuration; a product's tile is what lies beside the summed axis."""
    blocks = {name.removeprefix("BLOCK_"): value for name, value in values.items() if name.startswith("BLOCK_")}
    if isinstance(values.get("PIECES"), tuple):
        pieces = values["PIECES"]
        blocks["N"] = sum(pieces) if values.get("ONE_PASS") else max((*pieces, *values.get("TILE", ())))
        blocks["E"] = sum(values["WIDTHS"])
    product = "M" in blocks and "N" in blocks
    if product and min(blocks.values()) < SMALLEST_SIDE:
        return f"a product's sides are at least {SMALLEST_SIDE}"
    tile = (
        [blocks[side] for side in ("M", "N", "K") if side in blocks and side != summed] if product else blocks.values()
    )
    held = math.prod(tile)
    threads = WARP[chip] * values.get("num_warps", 4)
    if held > threads * NUMBERS_A_THREAD:
        return f"{held // threads} numbers a thread, at most {NUMBERS_A_THREAD} fit its registers"
    shared, stages = 0, values.get("num_stages", 1)
    if product and "K" in blocks:
        shared = stages * sum(tile) * blocks[summed] * itemsize
    elif product and "E" in blocks:  # what a program holds, q or k and v, and two tensors that it walks
        held, walked = (blocks["M"], blocks["N"]) if "TILE" in values else (2 * blocks["N"], blocks["M"])
        copies = 1 if "TILE" in values and values.get("ONE_PASS") else stages
        shared = (held + 2 * copies * walked) * blocks["E"] * itemsize
    if shared > SHARED_BYTES[chip]:
        return f"{shared >> 10} KiB of shared memory, {chip} has {SHARED_BYTES[chip] >> 10}"
    return None
