"""Where one transformer block spends its time, kernel by kernel: eager beside fastvit.

    python -m fastvit.benchmarks.breakdown [--model NAME] [--batch 256] [--dtype bfloat16] [--backend triton]

Two tables each, a forward pass without and a step with gradients. On a GPU the times are the kernels' own, from the
profiler; on a CPU they are those of PyTorch's operators without what they call.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import cases, measure, peers, suite

WARMUP, PASSES = 3, 10


@dataclass(frozen=True)
class Part:
    """One kernel: its name, launches in a pass and microseconds in a pass."""

    name: str
    launches: float
    us: float


def parts(call: Callable[[], object], device: torch.device) -> list[Part]:
    """What ran while the call did, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(WARMUP):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(PASSES):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = []
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu == (device.type == "cuda") and us > 0:
            found.append(Part(event.key, event.count / PASSES, us / PASSES))
    return sorted(found, key=lambda part: -part.us)


def table(title: str, found: Sequence[Part], wall_us: float, most: int = 20) -> str:
    """The parts as lines, their sum, and what a pass takes by the clock."""
    total = sum(part.us for part in found)
    lines = [title, f"{'us':>10}{'share':>8}{'calls':>8}  kernel"]
    for part in found[:most]:
        lines.append(f"{part.us:>10.1f}{part.us / total:>8.1%}{part.launches:>8.1f}  {part.name[:90]}")
    if len(found) > most:
        rest = sum(part.us for part in found[most:])
        lines.append(f"{rest:>10.1f}{rest / total:>8.1%}{'':>8}  {len(found) - most} more")
    return "\n".join([*lines, f"{total:>10.1f}  in all; one pass takes {wall_us:.1f} us by the clock", ""])


def blocks(model: str, dtype: torch.dtype, device: torch.device) -> dict[str, torch.nn.Module]:
    """The model's first block as its library wrote it, and the same block accelerated; equal weights."""
    import fastvit

    base = peers.baseline(model, seed=0)
    eager = copy.deepcopy(base.model).to(device, dtype)
    with fastvit.backend("reference"):
        fused = fastvit.accelerate(copy.deepcopy(base.model).to(device, dtype))
    return {f"eager ({base.source})": eager.blocks[0], "fastvit": fused.blocks[0]}


def _forward(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return block(x)


def _step(block: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(block(x), [x, *block.parameters()], dy)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 0 on success."""
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.breakdown", description=(__doc__ or "")[:80])
    parser.add_argument("--model", default="vit_base_patch16_224", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=0, help="default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--dtype", default="", choices=["", *cases.DTYPES], help="default: bfloat16, on a CPU float32")
    parser.add_argument("--backend", default="", help="default: triton on a GPU, auto on a CPU")
    given = parser.parse_args(arguments)
    import fastvit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    backend, batch = given.backend or ("triton" if gpu else "auto"), given.batch or (256 if gpu else 8)
    dtype = cases.DTYPES[given.dtype or ("bfloat16" if gpu else "float32")]
    try:
        if (reason := suite.why_not_measured(backend, device)) is not None:
            raise ValueError(f"backend {backend} cannot be measured here: {reason}")
        tokens = cases.tokens(fastvit.config.preset(given.model))
        found = blocks(given.model, dtype, device)
    except ValueError as error:
        print(f"breakdown: {error}", file=sys.stderr)
        return 1
    for name, block in found.items():
        width = next(block.parameters()).shape[-1]
        x = torch.randn(batch, tokens, width, device=device).to(dtype).requires_grad_()
        work = {"forward": functools.partial(_forward, block, x.detach())}
        work["forward and backward"] = functools.partial(_step, block, x, torch.randn_like(x).detach())
        for direction, call in work.items():
            with fastvit.backend(backend):
                listed = parts(call, device)
                clock = measure.stopwatch(device)
                wall = measure.quantile([clock(call) for _ in range(PASSES)], 0.5)
            title = f"{name}: {direction}, one block of {given.model}, {batch} x {tokens} x {width} {dtype}"
            print(table(title, listed, wall * 1e6))
    return 0


if __name__ == "__main__":
    sys.exit(main())
