"""Single ops: `pytest benchmarks -k "attention and forward" --benchmark-group-by=group`."""

import functools
from collections.abc import Iterator

import pytest
import torch

from fastvit.benchmarks import measure, op_cases, op_suite

PROVIDERS = {"cpu": ("eager", "fastvit"), "cuda": ("eager", "fastvit-triton", "fastvit-cuda")}


def _parameters() -> Iterator[object]:
    for device, names in PROVIDERS.items():
        for case in op_cases.grid(gpu=device == "cuda")[0]:
            for name in (*names, *(op_suite.SDPA if case.op == "attention" else ())):
                label = f"{case.op}-{case.shape}-{case.dtype}-{case.direction}-{device}-{name}"
                yield pytest.param(case, device, name, id=label, marks=[pytest.mark.gpu] if device == "cuda" else [])


@functools.lru_cache(maxsize=1)
def _prepared(case: op_cases.OpCase, device: str) -> tuple[dict[str, measure.Provider], dict[str, str]]:
    place = torch.device(device)
    return op_suite.sound_providers(case, op_suite.Options(place, op_suite.candidates(place, ())[0]))


@pytest.mark.parametrize(("case", "device", "provider"), list(_parameters()))
def test_op(case: op_cases.OpCase, device: str, provider: str, measured) -> None:
    work = case.work
    facts = {"flops": work.flops, "bytes": work.bytes(case.torch_dtype.itemsize)}
    group = f"{case.op} {case.shape} {case.dtype} {case.direction}"
    measured(*_prepared(case, device), provider, group, **facts)
