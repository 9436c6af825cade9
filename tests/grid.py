"""`@pytest.mark.grid(12)`: of a test's full product of parameters, 12 cases run; `pytest --full` runs all of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--full", action="store_true", help="run every case of the tests marked grid, not a sample")


@pytest.hookimpl(trylast=True)  # so that -k narrows the grid first and the sample is one of what is left
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if config.getoption("--full"):
        return
    tests: dict[tuple[str, str], list[Any]] = {}
    for item in items:
        if item.get_closest_marker("grid"):
            tests.setdefault((item.parent.nodeid, item.originalname), []).append(item)
    dropped = {item for cases in tests.values() for item in _left_out(cases)}
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def _left_out(items: list[Any]) -> list[Any]:
    (count,) = items[0].get_closest_marker("grid").args
    # A case that is skipped anyway (a backend this machine lacks) must not use up a place in the sample.
    able = [item for item in items if not item.get_closest_marker("skip")] or items
    cases = {item.name: {(axis, str(value)) for axis, value in item.callspec.params.items()} for item in able}
    kept = set(sample(cases, count))
    return [item for item in items if item.name not in kept]


def sample(cases: dict[str, set[tuple[str, str]]], count: int) -> list[str]:
    """`count` of the named cases, always the same: each value of each axis if they suffice, and as evenly as possible.

    Args:
        cases: for each name its (axis, value) pairs.
    """
    left = sorted(cases, key=lambda name: hashlib.sha256(name.encode()).digest())
    used: Counter[tuple[str, str]] = Counter()
    chosen = []
    while left and len(chosen) < count:
        best = min(left, key=lambda name: (-sum(not used[pair] for pair in cases[name]), _crowding(cases[name], used)))
        chosen.append(best)
        left.remove(best)
        used.update(cases[best])
    return chosen


def _crowding(pairs: set[tuple[str, str]], used: Counter[tuple[str, str]]) -> int:
    return sum(used[pair] ** 2 for pair in pairs)
