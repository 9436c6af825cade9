"""Clocks for calls that are shorter than what surrounds them: `Burst` on a GPU, `Several` on a CPU."""

import statistics
import time
import weakref
from collections.abc import Callable

import torch

BURST_S, BURST_CALLS = 3e-3, (3, 40)  # device seconds of one burst, and its fewest and most calls
SAMPLE_S, SAMPLE_CALLS = 5e-3, 5  # seconds of one sample of short calls, and its fewest calls


class Several:
    """A clock for short calls on a CPU: the median of as many in a row as take `SAMPLE_S` together.

    The first call after another's finds cold caches and threads asleep, and any may be interrupted for longer than it
    takes: a median of `SAMPLE_CALLS` at least knows neither.
    """

    def __init__(self, clock: Callable[[Callable[[], object]], float]) -> None:
        self._clock = clock

    def __call__(self, call: Callable[[], object]) -> float:
        taken = [self._clock(call)]
        while sum(taken) < SAMPLE_S or (len(taken) < SAMPLE_CALLS and min(taken) < SAMPLE_S):
            taken.append(self._clock(call))
        return statistics.median(taken)


class Burst:
    """A clock for calls shorter than their launch: device seconds of one call, from many queued one behind the other.

    A kernel that spins holds the queue back until all of them are in it, so that the device never waits for Python.
    What a lone call costs a user, launch included, is `stopwatch`'s to say.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Weak, because a call may hold a graph and all that was kept for its backward.
        self._plans: weakref.WeakKeyDictionary[Callable[[], object], tuple[int, int]] = weakref.WeakKeyDictionary()
        probe = 10_000_000
        self._cycles_per_s = probe / self._timed(lambda: torch.cuda._sleep(probe), 1, 0)

    def __call__(self, call: Callable[[], object]) -> float:
        if call not in self._plans:
            self._plans[call] = self._plan(call)
        return self._timed(call, *self._plans[call])

    def _plan(self, call: Callable[[], object]) -> tuple[int, int]:
        """How many calls make a burst, and how many cycles to spin while they are queued."""
        few, most = BURST_CALLS
        call()
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(few):
            call()
        queued = (time.perf_counter() - start) / few
        torch.cuda.synchronize(self._device)
        done = (time.perf_counter() - start) / few
        count = max(few, min(int(BURST_S / done), most))
        return count, int(1.5 * queued * count * self._cycles_per_s)

    def _timed(self, call: Callable[[], object], count: int, cycles: int) -> float:
        torch.cuda.synchronize(self._device)
        if cycles:
            torch.cuda._sleep(cycles)
        self._start.record()
        for _ in range(count):
            call()
        self._end.record()
        torch.cuda.synchronize(self._device)
        return self._start.elapsed_time(self._end) / 1e3 / count
