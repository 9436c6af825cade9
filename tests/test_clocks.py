"""The clocks of the op-level benchmark: cold caches, bursts that no launch gap enters, ceilings sampled sparsely."""

import pytest
import torch

from fastvit.benchmarks import clocks, measure


def test_a_gpu_gets_as_many_sets_as_its_cache_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.cold_sets(torch.device("cpu"), 1) == 1

    class Properties:
        L2_cache_size = 60 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda")
    for set_bytes in (1, 2**20, 60 * 2**20, 2**32):
        count = measure.cold_sets(gpu, set_bytes)
        assert measure.SETS[0] <= count <= measure.SETS[1]
        assert count == measure.SETS[1] or count * set_bytes >= 4 * Properties.L2_cache_size


class FakeGpu:
    """A device with a queue: sleeping and calls take device time, recording an event reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.now += cycles / 2e9


def test_a_burst_times_the_device_and_not_the_queueing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    calls = []

    def call() -> None:
        calls.append(gpu.now)
        gpu.now += 5e-6

    clock = clocks.Burst(torch.device("cuda"))
    assert clock(call) == pytest.approx(5e-6)
    planned = len(calls)
    assert clock(call) == pytest.approx(5e-6)
    burst = len(calls) - planned
    assert clocks.BURST_CALLS[0] <= burst <= clocks.BURST_CALLS[1]
    assert gpu.slept[-1] > 0, "nothing held the queue back"


def test_a_costly_ceiling_is_sampled_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def sample() -> None:
        taken.append(now[0])
        now[0] += 1.0

    maybe = measure.sparsely(sample, share=0.25, least=3)
    for _ in range(3):
        maybe()
    assert len(taken) == 3
    for _ in range(300):
        maybe()
        now[0] += 0.1
    assert len(taken) == pytest.approx(0.25 * now[0], abs=2)


def test_a_short_call_is_the_median_of_several() -> None:
    def sampled(*seconds: float) -> tuple[float, int]:
        """The calls take these seconds, and the last ones whatever the last of them took."""
        made = list[float]()

        def stopwatch(call) -> float:
            call()
            return seconds[min(len(made), len(seconds)) - 1]

        told = clocks.Several(stopwatch)(lambda: made.append(0.0))
        return told, len(made)

    least = clocks.SAMPLE_CALLS
    assert sampled(1.0, 0.5) == (1.0, 1), "one call of a long one"
    told, calls = sampled(1e-3, 1e-4)
    assert told == 1e-4, "the first found its caches cold"
    assert calls == pytest.approx((clocks.SAMPLE_S - 1e-3) / 1e-4 + 1, abs=1)
    assert sampled(1e-4, 1.0, 1e-4) == (1e-4, least), "an interruption is no reason to stop at few"
    assert sampled(1.0, 1e-4) == (1.0, 1)
