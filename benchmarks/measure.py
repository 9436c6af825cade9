"""Fair timing: every provider once per round, in rotating order, medians over rounds; and the memory one call adds."""

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import environment

WARMUP_ROUNDS = 2
SETS = (2, 256)  # fewest and most sets of tensors that take turns
BUDGET_S = 20.0  # timed seconds per case when the number of rounds is left open
MIN_ROUNDS, MAX_ROUNDS = 5, 200
LONG_S = 0.2
COPY_MIB = (256, 1024)
REST_S = 0.03  # longer than the threads of OpenMP, ONNX Runtime and oneTBB spin for work


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    run does it once; scope is entered around warm-up and timing but outside the clock, such as `fastvit.backend(name)`.
    batches: whole batches that one run does side by side; its time is divided by them. note: for its row.
    """

    name: str
    run: Callable[[], torch.Tensor]
    scope: Callable[[], AbstractContextManager] = contextlib.nullcontext
    batches: int = 1
    note: str = ""


@dataclass
class Timing:
    """Seconds per call, one for each round."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return quantile(self.samples, 0.5)

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)


def quantile(samples: Iterable[float], share: float) -> float:
    """The `share` quantile, linear between neighbours; the median for 0.5.

    Raises:
        ValueError: there are no samples.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("quantile: no samples")
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def ratio(base: Timing, other: Timing) -> float:
    """How many times faster than base other is: the median of base's seconds over its own, round by round.

    What slows a machine down for a while slows both of a round, and leaves their quotient alone.

    Raises:
        ValueError: they were not timed in the same rounds.
    """
    return quantile([one / two for one, two in zip(base.samples, other.samples, strict=True)], 0.5)


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs a call and returns its seconds: CUDA events on a GPU, the monotonic clock elsewhere.

    On a GPU the queue is empty when the first event is recorded, so launch overhead counts as it does for a user.
    """
    if device.type != "cuda":
        return _time_on_cpu
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_on_cuda(call: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return time_on_cuda


def _time_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def settled(clock: Callable[[Callable[[], object]], float]) -> Callable[[Callable[[], object]], float]:
    """The same clock after a rest and an untimed call.

    Libraries with threads of their own leave them spinning for a while after a call, which would slow down whoever runs
    next; the rest lets them fall asleep, and the untimed call wakes those of the library that is timed. A call that
    took longer than `LONG_S` does without: waking its threads is a small part of it.
    """

    long: set[Callable[[], object]] = set()

    def clock_settled(call: Callable[[], object]) -> float:
        time.sleep(REST_S)
        if call not in long:
            call()
        seconds = clock(call)
        if seconds > LONG_S:
            long.add(call)
        return seconds

    return clock_settled


def cold_sets(device: torch.device, set_bytes: int) -> int:
    """How many sets of tensors must take turns so that none is in the cache when its turn comes: four caches' worth.

    One on a CPU, where a model's layers hand each other their results through the cache as well.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    fewest, most = SETS
    return max(fewest, min(math.ceil(4 * cache / set_bytes), most))


class Turns:
    """A call that runs the next of several calls each time."""

    def __init__(self, calls: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._calls, self._next = calls, 0

    def __call__(self) -> torch.Tensor:
        chosen = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        return chosen()


def sparsely(sample: Callable[[], object], share: float = 0.25, least: int = 5) -> Callable[[], None]:
    """The same measurement, but for its first few times left out when it has taken more than this share of the time."""
    start, spent, taken = time.perf_counter(), 0.0, 0

    def maybe() -> None:
        nonlocal spent, taken
        before = time.perf_counter()
        if taken < least or spent <= share * (before - start):
            sample()
            taken += 1
            spent += time.perf_counter() - before

    return maybe


def interleave(
    providers: Sequence[Provider],
    clock: Callable[[Callable[[], object]], float],
    repeats: int | None = None,
    warmup: int = WARMUP_ROUNDS,
    on_round: Callable[[int, int], None] = lambda done, rounds: None,
    between: Callable[[], object] = lambda: None,
    budget_s: float = BUDGET_S,
) -> dict[str, Timing]:
    """Time providers against each other.

    Whatever disturbs the machine for a while disturbs all of them alike. The order rotates by one from round to round
    and every other round runs backwards, so that nobody is always first, or always after the same neighbour.

    Args:
        providers: what to time.
        clock: runs a call and returns its seconds.
        repeats: rounds to time; None takes as many as fit in `budget_s`, within `MIN_ROUNDS` and `MAX_ROUNDS`.
        warmup: rounds that are run first and not kept.
        on_round: told (rounds done, rounds in all) after each round, warm-up included.
        between: runs after each timed round, such as the measurement of a ceiling.
        budget_s: timed seconds in all when the number of rounds is left open.
    """
    timings = {provider.name: Timing() for provider in providers}
    last_round = 0.0
    for turn in range(warmup):
        last_round = sum(_one_round(providers, clock, turn).values())
        on_round(turn + 1, warmup + (repeats or MIN_ROUNDS))
    if repeats is None:
        fitting = int(budget_s / last_round) if last_round > 0 else MIN_ROUNDS
        repeats = max(MIN_ROUNDS, min(fitting, MAX_ROUNDS))
    for turn in range(repeats):
        for name, seconds in _one_round(providers, clock, turn).items():
            timings[name].samples.append(seconds)
        between()
        on_round(warmup + turn + 1, warmup + repeats)
    return timings


def _one_round(
    providers: Sequence[Provider], clock: Callable[[Callable[[], object]], float], turn: int
) -> dict[str, float]:
    seconds = {}
    for provider in _order(providers, turn):
        with provider.scope():
            seconds[provider.name] = clock(provider.run) / provider.batches
    return seconds


def _order(providers: Sequence[Provider], turn: int) -> list[Provider]:
    first = turn % len(providers) if providers else 0
    rotated = [*providers[first:], *providers[:first]]
    return rotated[::-1] if turn % 2 else rotated


def peak_mib(provider: Provider, device: torch.device) -> float | None:
    """MiB that one call adds, at its highest, to what was held before it; weights and inputs are held before.

    On a GPU the caching allocator tells, on Linux the resident set's high-water mark; elsewhere None.
    """
    with provider.scope():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            provider.run()
            torch.cuda.synchronize(device)
            return (torch.cuda.max_memory_allocated(device) - before) / 2**20
        if not _reset_high_water_mark():
            return None
        before_kib = _status_kib("VmRSS")
        provider.run()
        after_kib = _status_kib("VmHWM")
        return None if before_kib is None or after_kib is None else max(after_kib - before_kib, 0) / 1024


def _reset_high_water_mark() -> bool:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed pages resident, which would hide their next use
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_kib(field_name: str) -> int | None:
    try:
        found = re.search(rf"^{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


class Ceiling:
    """What this machine reaches right now: the rate of a large matrix product and of a large copy.

    In int8, for which PyTorch has no plain product, the rate is that of multiply-adds on registers alone.

    `sample()` between the rounds of `interleave` puts the ceilings under the same load as the work they judge. Random
    data: on a GPU zeros draw less power and run faster than any real work.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        side, copy_mib = (8192, 2048) if device.type == "cuda" else (1536, _copy_mib())
        self._clock = stopwatch(device)
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        if device.type == "cpu" and not self._has_fast_product(left[:256, :256]):
            left, right = left[:256, :256].clone(), right[:256, :256].clone()
        self._flops = 2 * left.shape[0] ** 3
        products = _products(left, right) if dtype.is_floating_point else []
        self._products = [(product, Timing()) for product in products]
        self._source = torch.ones(copy_mib * 2**20, dtype=torch.uint8, device=device)
        self._target = self._source.clone()
        self._copies = Timing()
        self._register_peak, self._peaks = register_peak(device, dtype), list[float]()
        for product, _ in self._products:  # the first call of each is not kept
            product()

    def _has_fast_product(self, small: torch.Tensor) -> bool:
        """Whether 256 x 256 takes under 10 ms: some dtypes, fp16 on most CPUs, are a hundred times slower."""
        return min(self._clock(lambda: torch.mm(small, small)) for _ in range(3)) < 0.01

    def forget(self) -> None:
        """Start anew, with the same matrices: what another case saw is no yardstick for this one."""
        for timing in (self._copies, *(timing for _, timing in self._products)):
            timing.samples.clear()
        self._peaks.clear()

    def sample(self) -> None:
        """Measure each once."""
        for product, timing in self._products:
            timing.samples.append(self._clock(product))
        if self._register_peak is not None:
            self._peaks.append(self._register_peak())
        self._copies.samples.append(self._clock(lambda: self._target.copy_(self._source)))

    @property
    def gflops(self) -> float:
        """GFLOP/s of the fastest matrix product, or of multiply-adds on registers where those are faster; medians."""
        rates = [self._flops / timing.median / 1e9 for _, timing in self._products]
        return max([*rates, quantile(self._peaks, 0.5)] if self._peaks else rates)

    @property
    def gbs(self) -> float:
        """GB/s of the copy, read and write counted, median."""
        return 2 * self._source.numel() / self._copies.median / 1e9


def _copy_mib() -> int:
    """Twice the processor's largest cache, within reason: less would be copied inside it."""
    fewest, most = COPY_MIB
    return max(fewest, min(2 * environment.cpu_cache_bytes() // 2**20, most))


def register_peak(device: torch.device, dtype: torch.dtype) -> Callable[[], float] | None:
    """GFLOP/s of a CPU's multiply-adds without memory, on all threads; None where the compiled extension is absent."""
    import fastvit.backends

    if device.type != "cpu" or fastvit.backends.why_unavailable("cpu") is not None:
        return None
    compute = "float32" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
    return lambda: torch.ops.fastvit_native.cpu_peak(compute)


def peak_lines(device: torch.device, dtypes: Iterable[torch.dtype]) -> list[str]:
    """One line per dtype: what multiply-adds reach on this machine right now; none where there is no such measure."""
    peaks = {dtype: peak for dtype in dtypes if (peak := register_peak(device, dtype)) is not None}
    rates = {str(dtype).removeprefix("torch."): max(peak() for _ in range(3)) for dtype, peak in peaks.items()}
    return [f"multiply-adds on registers, {name}: {rate:.0f} GFLOP/s" for name, rate in rates.items()]


def _products(left: torch.Tensor, right: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """torch's own product and, on a CPU that has it, oneDNN's with packed weights: MKL is slow on AMD processors."""
    products: list[Callable[[], torch.Tensor]] = [lambda: torch.mm(left, right)]
    if left.device.type == "cpu":
        with contextlib.suppress(AttributeError, RuntimeError, TypeError):  # private ops, absent from some builds
            packed = torch.ops.mkldnn._reorder_linear_weight(right, left.shape[0])

            def packed_product() -> torch.Tensor:
                return torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")

            packed_product()
            products.append(packed_product)
    return products
