"""What a profile says: equal calls of an op as one line, with the least time that their work allows on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import call_work, measure, recording


@dataclass(frozen=True)
class Roof:
    """What this machine reached in the same run: GFLOP/s of a product, GB/s of a copy."""

    gflops: float
    gbs: float

    def seconds(self, flops: int, bytes: int) -> tuple[float, str]:
        """The least time for that much work, and what it is bound by: "arithmetic" or "memory"."""
        arithmetic, memory = flops / self.gflops / 1e9, bytes / self.gbs / 1e9
        return (arithmetic, "arithmetic") if arithmetic > memory else (memory, "memory")


@dataclass(frozen=True)
class Kernel:
    """A GPU kernel that a line's calls launched, with its launches and seconds in a pass."""

    name: str
    launches: float
    seconds: float


@dataclass(frozen=True)
class Line:
    """Equal calls of an op in a pass: seconds, bytes and FLOPs of all of them, None where FLOPs are unknown."""

    op: str
    shape: str
    calls: int
    seconds: float
    bytes: int
    flops: int | None
    kernels: tuple[Kernel, ...] = ()

    def least(self, roof: Roof) -> tuple[float, str]:
        """The time that the roof allows these calls, and what bounds it; (0, "") where there is no work to count."""
        return roof.seconds(self.flops or 0, self.bytes) if self.flops or self.bytes else (0.0, "")

    def lost(self, roof: Roof) -> float:
        """Seconds beyond that."""
        return max(self.seconds - self.least(roof)[0], 0.0)


@dataclass(frozen=True)
class Profile:
    """A subject's pass: its lines, the longest first, seconds outside of them, and the pass by the clock alone.

    noise: 80th over 20th percentile of the passes by the clock.
    """

    title: str
    direction: str
    provider: str
    lines: tuple[Line, ...]
    outside: float
    clock: float
    passes: int
    roof: Roof
    note: str = ""
    noise: float = 1.0

    @property
    def total(self) -> float:
        return sum(line.seconds for line in self.lines) + self.outside


@dataclass
class Timed:
    """What the profiler saw of several passes.

    seconds: of each call, one for each pass. kernels: of each call, all kernels of all passes. outside: seconds of each
    pass outside the calls, by the host's clock.
    """

    seconds: list[list[float]]
    kernels: list[list[tuple[str, float]]]
    outside: list[float] = field(default_factory=list)

    @property
    def passes(self) -> int:
        return len(self.outside)


def lines_of(calls: Sequence[recording.Call], timed: Timed, dtype: str) -> list[Line]:
    """Calls of equal op, shapes and dtypes as one line each, the longest first; a call's time is its median."""
    groups: dict[tuple, list[int]] = {}
    for index, call in enumerate(calls):
        groups.setdefault((call.name, _signature(call)), []).append(index)
    lines = []
    for members in groups.values():
        alike = [calls[index] for index in members]
        flops = [call_work.flops_of(call) for call in alike]
        lines.append(
            Line(
                alike[0].name,
                shape_of(alike[0], dtype),
                len(alike),
                sum(measure.quantile(timed.seconds[index], 0.5) for index in members),
                sum(map(call_work.bytes_of, alike)),
                None if None in flops else sum(filter(None, flops)),
                _kernels([one for index in members for one in timed.kernels[index]], timed.passes),
            )
        )
    return sorted(lines, key=lambda line: -line.seconds)


def _kernels(launched: Sequence[tuple[str, float]], passes: int) -> tuple[Kernel, ...]:
    """What was launched in all passes, as kernels of one pass, the longest first."""
    durations: dict[str, list[float]] = {}
    for name, duration in launched:
        durations.setdefault(name, []).append(duration)
    kernels = [Kernel(name, len(its) / passes, sum(its) / passes) for name, its in durations.items()]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.seconds))


def _signature(call: recording.Call) -> tuple:
    return tuple((operand.shape, operand.dtype) for operand in recording.operands(call.arguments))


def shape_of(call: recording.Call, dtype: str) -> str:
    """The first two different shapes of a call's matrices, "197x768,3072x768", and its dtype where that is unusual."""
    given = recording.operands([one for one in call.arguments if isinstance(one, recording.Operand)])
    given = given or recording.operands(call.results)
    if not given:
        return "-"
    shapes = ["x".join(map(str, one.shape)) or "scalar" for one in given]
    matrices = dict.fromkeys(shape for shape, one in zip(shapes, given, strict=True) if len(one.shape) > 1)
    named = ",".join([*matrices][:2]) or shapes[0]
    return named if given[0].dtype == dtype else f"{named}:{given[0].dtype}"
