"""Where the time goes: a pass of a model op by op, each op's time beside the least that its work allows here.

Every subject runs as it always does: PyTorch's profiler times the ops from inside their calls, `recording` tells what
they were called with. On a CPU a time is the op's own call, with what it does in Python; on a GPU it is that of the
kernels which the call launched, so that gaps between launches are outside the ops.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import cases, measure, peers, recording, suite, training
from .profile_lines import Profile, Roof, Timed, lines_of

WARMUP = 3
BUDGET_S, PASSES = 4.0, (5, 30)  # seconds of the profiled passes together, their fewest and most
# what runs whole blocks
WHOLE_BLOCKS = ("fastvit_native::encoder", "fastvit::block")


Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """How to profile.

    device: where. backends: "eager" and fastvit's. depth: blocks to keep, None for all. by_op: also without the kernels
    that run whole blocks. repeats: profiled passes, None for as many as fit. trace: where the profiler's traces go.
    """

    device: torch.device
    backends: tuple[str, ...]
    depth: int | None = None
    by_op: bool = False
    repeats: int | None = None
    seed: int = 0
    trace: Path | None = None


@dataclass(frozen=True)
class Subject:
    """Who is profiled: its name, one pass, the scope that it runs in, and what a reader should know.

    compute: what its products multiply, whose rate is the roof. dtype: of most of its tensors.
    """

    name: str
    run: Callable[[], object]
    scope: Callable[[], AbstractContextManager]
    compute: torch.dtype
    dtype: torch.dtype
    note: str = ""


def run_case(case: cases.Case, options: Options, report: suite.Report = lambda *stage: None) -> list[Profile]:
    """Profile each backend on a case, one after the other.

    Raises:
        ValueError: the model has fewer blocks than are to be kept, or cannot be profiled op by op.
        RuntimeError: two passes ran different ops.
    """
    blocks = case.config.depth
    if options.depth is not None and options.depth > blocks:
        raise ValueError(f"{case.model} has {blocks} blocks, fewer than depth {options.depth}")
    if options.by_op and case.dtype == cases.INT8:
        raise ValueError("int8 products are the whole encoder's: there is none to profile op by op")
    base = _baseline(case.model, options.seed, case.img_size)
    found: list[Profile] = []
    for number, backend in enumerate(options.backends):
        report(backend, number, len(options.backends))
        subject = _subject(case, options, base, backend)
        found.append(_profile(case, options, subject))
        if options.by_op and any(line.op in WHOLE_BLOCKS for line in found[-1].lines):
            apart = replace(subject, name=f"{subject.name}-by-op", scope=functools.partial(_by_op, subject.scope))
            slower = _profile(case, options, apart)
            more = (slower.clock - found[-1].clock) * 1e3
            note = f"the blocks op by op, which is not how they run: {more:+.2f} ms by the clock"
            found.append(replace(slower, note=note))
    return found


@functools.lru_cache(maxsize=1)
def _baseline(name: str, seed: int, img_size: int | None) -> peers.Baseline:
    return peers.baseline(name, seed, img_size)


@contextlib.contextmanager
def _by_op(scope: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """A scope in which no backend has the kernels that run whole blocks, so that the blocks' ops run one by one."""
    from fastvit.backends import OPS

    served = OPS["encoder"]
    OPS["encoder"] = ()
    try:
        with scope():
            yield
    finally:
        OPS["encoder"] = served


def _subject(case: cases.Case, options: Options, base: peers.Baseline, backend: str) -> Subject:
    import fastvit

    height, width = cases.pair(case.config.img_size)
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(case.batch, case.config.in_chans, height, width, generator=generator)
    model: Any = copy.deepcopy(base.model)
    model.blocks = model.blocks[: options.depth]
    model = model.to(options.device, case.torch_dtype).train(case.direction == cases.TRAINING)
    images, note = images.to(options.device, case.torch_dtype), base.source
    scope = functools.partial(fastvit.backend, "reference" if backend == suite.EAGER else backend)
    if backend != suite.EAGER:
        with scope():
            note = ""
            if case.dtype == cases.INT8:
                model, images = model.bfloat16(), images.bfloat16()
            model = fastvit.accelerate(model)
            if case.dtype == cases.INT8:
                layers = fastvit.quantize(model)
                note = f"{sum(layer.int8 for layer in layers)} of {len(layers)} linear layers in int8"
    name = suite.EAGER if backend == suite.EAGER else suite.provider_name(backend)
    compute = images.dtype if case.dtype == cases.INT8 and backend == suite.EAGER else case.compute
    dtypes = compute, images.dtype if case.dtype == cases.INT8 else compute
    if case.direction == cases.FORWARD:
        return Subject(name, functools.partial(_forward, model, images), scope, *dtypes, note)
    autocast = None if case.compute == case.torch_dtype else case.compute
    labels = training.labels(case.batch, case.config.num_classes, options.seed, options.device)
    return Subject(name, training.Step(model, images, labels, autocast), scope, *dtypes, note)


def _forward(model: Callable[[torch.Tensor], object], images: torch.Tensor) -> object:
    with torch.inference_mode():
        return model(images)


def _profile(case: cases.Case, options: Options, subject: Subject) -> Profile:
    """Warm up, record, time passes by the profiler, and before and behind them others by the clock, roof by roof."""
    ceiling = _ceiling(options.device, subject.compute)
    ceiling.forget()
    clock = measure.stopwatch(options.device)

    def clocked_pass() -> float:
        ceiling.sample()
        subject.run()  # the caches hold the model again, not the ceiling's matrices
        return clock(subject.run)

    with subject.scope():
        last = _repeat(WARMUP, lambda: clock(subject.run))[-1]
        fewest, most = PASSES
        passes = options.repeats or max(fewest, min(int(BUDGET_S / last), most))
        seen = recording.record(subject.run)
        clocked = _repeat(math.ceil(passes / 2), clocked_pass)
        timed = time_calls(subject.run, seen, options.device, passes, _trace(case, options, subject))
        clocked += _repeat(math.ceil(passes / 2), clocked_pass)
    wall = measure.quantile(clocked, 0.5)
    lines = lines_of(seen.calls, timed, str(subject.dtype).removeprefix("torch."))
    if options.device.type == "cuda":
        lines = [line for line in lines if line.kernels]
        outside = wall - sum(line.seconds for line in lines)
    else:
        outside = measure.quantile(timed.outside, 0.5)
    kept = "" if options.depth is None else f" {options.depth} of {case.config.depth} blocks"
    roof = Roof(ceiling.gflops, ceiling.gbs)
    noise = measure.quantile(clocked, 0.8) / measure.quantile(clocked, 0.2)
    title, way = case.title + kept, case.direction
    return Profile(title, way, subject.name, tuple(lines), outside, wall, passes, roof, subject.note, noise)


@functools.lru_cache(maxsize=2)
def _ceiling(device: torch.device, compute: torch.dtype) -> measure.Ceiling:
    return measure.Ceiling(device, compute)


def _repeat(times: int, call: Callable[[], Result]) -> list[Result]:
    return [call() for _ in range(times)]


def _trace(case: cases.Case, options: Options, subject: Subject) -> Path | None:
    """The file for the trace of these passes: the one that was asked for, named after who runs in it."""
    if options.trace is None:
        return None
    return options.trace.with_name(f"{options.trace.stem}-{subject.name}-{case.direction}{options.trace.suffix}")


def time_calls(
    run: Callable[[], object], seen: recording.Recording, device: torch.device, passes: int, trace: Path | None = None
) -> Timed:
    """Run several passes under PyTorch's profiler; what it saw is written to `trace` as well, for chrome://tracing.

    Raises:
        RuntimeError: a pass ran other ops than the recorded one.
    """
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
    extents = []
    with recording.quiet():
        profiler.start()
    try:
        for _ in range(passes):
            begin = time.perf_counter()
            run()
            if gpu:
                torch.cuda.synchronize(device)
            extents.append(time.perf_counter() - begin)
    finally:
        with recording.quiet():
            profiler.stop()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return read_events(profiler.events() or (), seen, extents, gpu)


def read_events(events: Iterable[Any], seen: recording.Recording, extents: Sequence[float], gpu: bool) -> Timed:
    """The recorded calls' times among the profiler's events of as many passes as there are extents, in seconds.

    Raises:
        RuntimeError: a pass ran other ops than the recorded one.
    """
    on_host = [e for e in events if e.name in seen.names and e.device_type == torch.autograd.DeviceType.CPU]
    on_host.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    size = len(seen.steps)
    if len(on_host) != size * len(extents):
        raise RuntimeError("profile: two passes of the same work ran different ops")
    timed = Timed([[] for _ in seen.calls], [[] for _ in seen.calls])
    for number, extent in enumerate(extents):
        of_pass = on_host[number * size : (number + 1) * size]
        inside = 0.0
        for index, place in enumerate(seen.places([event.name for event in of_pass])):
            event = of_pass[place]
            launched = [(kernel.name, kernel.duration / 1e6) for kernel in _kernels(event)] if gpu else []
            seconds = event.time_range.elapsed_us() / 1e6
            inside += seconds
            timed.seconds[index].append(sum(duration for _, duration in launched) if gpu else seconds)
            timed.kernels[index] += launched
        timed.outside.append(extent - inside)
    return timed


def _kernels(event: Any) -> Iterator[Any]:
    """What a call launched itself or through the ops inside it."""
    yield from event.kernels
    for child in event.cpu_children:
        yield from _kernels(child)
