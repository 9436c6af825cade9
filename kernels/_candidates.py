"""What may be tried instead of a choice of `_tuning`: its neighbours, and the one predicate for "legal here".

Works by the names of fields, so that a new kind of configuration needs nothing here. A choice is a configuration, or a
tuple of configurations and whole numbers such as the parts of a split sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

# Shared memory that one program may take, by chip: that of the smallest chip a key stands for.
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "hip": 64 << 10}
# 255 registers a thread hold 128 sums beside addresses and operands; more spill.
NUMBERS_A_THREAD = 128
WARP = {"sm_80": 32, "sm_90": 32, "hip": 64}
SMALLEST_PRODUCT = 16  # of any side of a tl.dot
# Fewest and most.
RANGES = {"num_warps": (1, 16), "num_stages": (1, 6), "STAGES": (1, 6)}
BLOCKS = (1, 8192)
# Given by the shape: a padded head or row, and what follows from it.
FIXED = ("BLOCK_E", "ONE_PASS", "ONE_TILE")


def neighbours(choice: Any) -> Iterator[Any]:
    """Every choice one step away: a field doubled or halved, or one more or less; a block together with the warps."""
    if isinstance(choice, tuple):
        for place, part in enumerate(choice):
            for changed in neighbours(part):
                yield (*choice[:place], changed, *choice[place + 1 :])
    elif isinstance(choice, int) and not isinstance(choice, bool):
        yield from (number for number in (choice // 2, choice * 2) if number)
    elif dataclasses.is_dataclass(choice):
        yield from _near(choice)


def _near(config: Any) -> Iterator[Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    free = [name for name, value in values.items() if type(value) is int and name not in FIXED]
    for name in free:
        for up in (True, False):
            moved = {name: _step(name, values[name], up)}
            yield from _replaced(config, moved)
            if name.startswith("BLOCK") and "num_warps" in free:
                yield from _replaced(config, {**moved, "num_warps": _step("num_warps", values["num_warps"], up)})


def _replaced(config: Any, moved: dict[str, int]) -> Iterator[Any]:
    if all(fewest <= moved[name] <= most for name in moved for fewest, most in [RANGES.get(name, BLOCKS)]):
        yield dataclasses.replace(config, **moved)


def _step(name: str, value: int, up: bool) -> int:
    if "stages" in name.lower():
        return value + 1 if up else value - 1
    return value * 2 if up else value // 2


def legal(choice: Any, chip: str, itemsize: int) -> str | None:
    """Why a choice cannot work on a chip with elements of itemsize bytes, by arithmetic alone, or None.

    The compiler has the last word, and the check of the result the very last.
    """
    for part in choice if isinstance(choice, tuple) else (choice,):
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            reason = _why_not({f.name: getattr(part, f.name) for f in dataclasses.fields(part)}, chip, itemsize)
            if reason:
                return reason
    return None


def _why_not(config: dict[str, Any], chip: str, itemsize: int) -> str | None:
    blocks = {name.removeprefix("BLOCK_"): value for name, value in config.items() if name.startswith("BLOCK_")}
    product = "M" in blocks and "N" in blocks
    if product and min(blocks.values()) < SMALLEST_PRODUCT:
        return f"a product's sides are at least {SMALLEST_PRODUCT}"
    held = 1
    for side in ("M", "N") if product else blocks:
        held *= blocks[side]
    threads = WARP[chip] * config.get("num_warps", 4)
    if held > threads * NUMBERS_A_THREAD:
        return f"{held // threads} numbers a thread, at most {NUMBERS_A_THREAD} fit its registers"
    shared = 0
    if product and "K" in blocks:
        shared = config.get("num_stages", 1) * (blocks["M"] + blocks["N"]) * blocks["K"] * itemsize
    elif product and "E" in blocks:
        shared = (blocks["M"] + 2 * config.get("num_stages", 1) * blocks["N"]) * blocks["E"] * itemsize
    if shared > SHARED_BYTES[chip]:
        return f"{shared >> 10} KiB of shared memory, {chip} has {SHARED_BYTES[chip] >> 10}"
    return None
