"""`pytest benchmarks`: the suite's cases under pytest-benchmark, for comparing one run with another.

A case's providers run one after the other here, not in turns: ratios are what `fastvit bench` and `bench-ops` say.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from fastvit.benchmarks import environment, measure

GPU = torch.cuda.is_available()
_DESELECTED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases of a GPU are deselected where there is none."""
    elsewhere = [] if GPU else [item for item in items if item.get_closest_marker("gpu") is not None]
    if elsewhere:
        items[:] = [item for item in items if item not in set(elsewhere)]
        config.hook.pytest_deselected(items=elsewhere)
        config.stash[_DESELECTED] = len(elsewhere)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Why cases are missing."""
    count = config.stash.get(_DESELECTED, 0)
    return [f"GPU: {count} cases deselected: torch finds no GPU"] if count else []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What the rows of the suite carry as well."""
    machine_info["fastvit"] = environment.stamp(torch.device("cuda" if GPU else "cpu"))


@pytest.fixture
def measured(benchmark) -> Callable[..., None]:
    """Times a provider of a case, if its check is green: measured(case, providers, reasons, name, group)."""

    def run(
        providers: dict[str, measure.Provider], reasons: dict[str, str], name: str, group: str, **facts: object
    ) -> None:
        if name not in providers:
            reason = reasons.get(name, "no candidate on this machine")
            (pytest.fail if reason.startswith("FAILED") else pytest.skip)(reason)
        provider = providers[name]
        benchmark.group = group
        benchmark.extra_info.update(provider=name, batches=provider.batches, **facts)
        with provider.scope():
            benchmark(functools.partial(_synchronised, provider.run))

    return run


def _synchronised(call: Callable[[], object]) -> None:
    call()
    if GPU:
        torch.cuda.synchronize()
