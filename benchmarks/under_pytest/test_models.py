"""Whole models: `pytest benchmarks -k vit_base --benchmark-group-by=group`."""

import functools
from collections.abc import Iterator

import pytest
import torch

from fastvit.benchmarks import cases, images, measure, suite

GRIDS = {"cpu": ("default", "training"), "cuda": ("gpu",)}
PROVIDERS = {"cpu": ("eager", "fastvit"), "cuda": ("eager", "fastvit-triton", "fastvit-cuda")}


def _parameters() -> Iterator[object]:
    for device, names in PROVIDERS.items():
        for case in [case for grid in GRIDS[device] for case in cases.grid(grid)]:
            for name in names:
                label = f"{case.model}-{case.shape}-{case.dtype}-{case.direction}-{device}-{name}"
                yield pytest.param(case, device, name, id=label, marks=[pytest.mark.gpu] if device == "cuda" else [])


@functools.lru_cache(maxsize=1)
def _prepared(case: cases.Case, device: str) -> tuple[dict[str, measure.Provider], dict[str, str]]:
    place = torch.device(device)
    backends, _ = suite.candidates(place, ())
    return suite.sound_providers(case, suite.Options(place, backends, tuple(images.photographs()), "photographs"))


@pytest.mark.parametrize(("case", "device", "provider"), list(_parameters()))
def test_model(case: cases.Case, device: str, provider: str, measured) -> None:
    with torch.inference_mode(case.direction == cases.FORWARD):
        measured(*_prepared(case, device), provider, case.title, flops=case.flops, bytes=case.bytes)
