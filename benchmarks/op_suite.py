"""Run one op-level case: eager PyTorch, SDPA's backends, fastvit's and peers, checked, timed, as rows."""

import contextlib
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from . import accuracy, clocks, environment, measure, op_calls, rows as rows_module, suite
from .op_cases import OpCase
from .op_peers import Peer

EAGER = suite.EAGER
SDPA = {
    "sdpa-flash": "FLASH_ATTENTION",
    "sdpa-cudnn": "CUDNN_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
    "sdpa-math": "MATH",
}
BUDGET_S, ROUNDS = 0.7, (15, 100)  # of a case on a CPU: seconds, and fewest and most rounds whatever they take
GPU_ROUNDS = 25
CALL_ROUNDS = 7


@dataclass(frozen=True)
class Options:
    """How to measure: as `suite.Options`, without images. peers: who else takes part, torch.compile too."""

    device: torch.device
    backends: tuple[str, ...]
    peers: tuple[Peer, ...] = ()
    repeats: int | None = None
    seed: int = 0


@dataclass
class Candidate:
    """A function of the tensors, the scope it runs in, whether it is a peer's, and what its check said.

    A peer that is wrong keeps its speed, with a note; a peer that breaks is left out.
    """

    name: str
    function: Callable[..., torch.Tensor]
    scope: Callable[[], AbstractContextManager] = contextlib.nullcontext
    peer: bool = False
    judged: dict = field(default_factory=dict)


@dataclass
class Measured:
    """The rows of a case, eager first, and for each provider that could not take part the reason."""

    rows: list[dict]
    left_out: dict[str, str]


def candidates(device: torch.device, requested: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends to measure and, for those left out on this machine, the reason; a case may leave out more.

    Raises:
        suite.UnavailableError: a backend that was requested by name is no candidate here, or fastvit is switched off.
    """
    return suite.candidates(device, requested, whole_model=False)


def run_case(case: OpCase, options: Options, report: suite.Report = lambda stage, done, total: None) -> Measured:
    """Measure one case. A row that is not "ok" carries no speed."""
    report("build", 0, 1)
    if options.peers:
        torch.compiler.reset()
    with warnings.catch_warnings(), ieee_convolutions():
        warnings.simplefilter("ignore")  # SDPA warns for each backend that refuses; the reason is kept
        given = op_calls.tensors(case, options.device, options.seed)
        chosen, left_out = _candidates(case, options, given)
        chosen = _check(case, chosen, left_out, given, report)
        sound = [one for one in chosen if one.judged["status"] == "ok"]
        timings, ceiling = _time(case, options, sound, given, left_out, report)
    stamp = environment.stamp(options.device)
    rows = [{**_row(case, one, timings, ceiling), **stamp} for one in chosen if one.name not in left_out]
    del given, chosen, sound
    gc.collect()
    return Measured(rows, left_out)


def sound_providers(case: OpCase, options: Options) -> tuple[dict[str, measure.Provider], dict[str, str]]:
    """For a clock of somebody else's: who has passed the check, by name, and why the others are not there."""
    with warnings.catch_warnings(), ieee_convolutions():
        warnings.simplefilter("ignore")
        given = op_calls.tensors(case, options.device, options.seed)
        chosen, left_out = _candidates(case, options, given)
        chosen = _check(case, chosen, left_out, given, lambda stage, done, total: None)
        sound = [one for one in chosen if one.judged["status"] == "ok"]
        found = _providers(case, sound, cold_copies(case, options.device, given), left_out)
    return found, left_out | {one.name: f"FAILED: {one.judged['note']}" for one in chosen if one.name not in found}


@contextlib.contextmanager
def ieee_convolutions() -> Iterator[None]:
    """Without TF32, which PyTorch allows convolutions, and only them, by default: patch_embed's yardstick is fp32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _candidates(case: OpCase, options: Options, given: op_calls.Tensors) -> tuple[list[Candidate], dict[str, str]]:
    import fastvit

    call, left_out = op_calls.call(case), {}
    found = [Candidate(EAGER, call.eager)]
    if case.op == "attention":
        for name, member in SDPA.items():
            reason = _why_not_sdpa(member, call.eager, given)
            if reason is None:
                found.append(Candidate(name, call.eager, functools.partial(_sdpa, member)))
            else:
                left_out[name] = reason
    for backend in options.backends:
        name = suite.provider_name(backend)
        reason = None if backend == "auto" else call.why_not(given, backend)
        if reason is None:
            found.append(Candidate(name, call.fused, functools.partial(fastvit.backend, backend)))
        else:
            left_out[name] = reason
    for peer in options.peers:
        if peer.takes(case) and peer.why_not(options.device) is None:
            try:
                found.append(Candidate(peer.name, peer.build(case), peer.scope, peer=True))
            except Exception as error:
                left_out[peer.name] = suite.one_line(error)
    return found, left_out


def _sdpa(member: str) -> AbstractContextManager:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, member)])


def _why_not_sdpa(member: str, function: Callable[..., torch.Tensor], given: op_calls.Tensors) -> str | None:
    """Why one of SDPA's backends cannot run these tensors; PyTorch says it in warnings before it raises."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.no_grad(), _sdpa(member):
                function(**given)
        except (RuntimeError, AttributeError) as error:
            reasons = [str(one.message).partition(" (Triggered")[0].strip() for one in said]
            return reasons[-1] if reasons else suite.one_line(error)
    return None


def _check(
    case: OpCase,
    chosen: Sequence[Candidate],
    left_out: dict[str, str],
    given: op_calls.Tensors,
    report: suite.Report,
) -> list[Candidate]:
    """Hold every candidate to the tolerance rule, whose yardstick is eager's own error; returns those that ran."""
    wanted = () if case.direction == "forward" else op_calls.call(case).wanted
    with torch.no_grad():
        dy = op_calls.upstream(chosen[0].function(**given)) if wanted else None
    exact = op_calls.exact(case, given, dy)
    names = ("output", *(f"gradient of {name}" for name in wanted))
    eager: tuple[torch.Tensor, ...] = ()
    for number, one in enumerate(chosen):
        report(f"check {one.name}", number, len(chosen))
        try:
            with one.scope():
                got = results(one.function, given, wanted, dy)
        except Exception as error:  # one provider that breaks must not hide the others
            if one.name == EAGER:
                raise
            if one.peer:
                left_out[one.name] = suite.one_line(error)
            else:
                one.judged = {"status": "FAILED", "note": suite.one_line(error)}
            continue
        eager = eager or got
        one.judged = judge(names, got, exact, eager)
        if one.peer:
            one.judged["status"] = "ok"
    return [one for one in chosen if one.name not in left_out]


def results(
    function: Callable[..., torch.Tensor], given: op_calls.Tensors, wanted: tuple[str, ...], dy: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """What a function gives: the output and, with dy, the gradients of the wanted tensors."""
    if dy is None:
        with torch.inference_mode():
            return (function(**given),)
    output, *gradients = op_calls.run(function, op_calls.leaves(given, wanted), wanted, dy)
    return (output.detach(), *gradients)


def judge(
    names: Sequence[str], got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]
) -> dict:
    """status, note, max_error and error_ratio of the tensor that is worst beside eager's."""
    worst: dict = {"status": "ok", "note": "", "max_error": 0.0, "error_ratio": 0.0}
    for number, name in enumerate(names):
        error, ratio, reason = accuracy.judge(got[number], exact[number], eager[number], gradient=number > 0)
        if reason is not None:
            return {"status": "FAILED", "note": f"{name}: {reason}", "max_error": error, "error_ratio": ratio}
        if (ratio, error) > (worst["error_ratio"], worst["max_error"]):
            worst.update(max_error=error, error_ratio=ratio)
    return worst


def prepare(
    case: OpCase, function: Callable[..., torch.Tensor], sets: Sequence[op_calls.Tensors], dy: torch.Tensor | None
) -> measure.Turns:
    """One pass in the case's direction, over the sets in turn. A backward alone keeps its graphs, built here."""
    wanted = op_calls.call(case).wanted
    if dy is None:
        return measure.Turns([functools.partial(_inference, function, given) for given in sets])
    ready = [op_calls.leaves(given, wanted) for given in sets]
    if case.direction == "forward+backward":
        return measure.Turns([functools.partial(op_calls.run, function, given, wanted, dy) for given in ready])
    graphs = [(function(**given), [given[name] for name in wanted]) for given in ready]
    return measure.Turns(
        [functools.partial(torch.autograd.grad, y, inputs, dy, retain_graph=True) for y, inputs in graphs]
    )


@torch.inference_mode()
def _inference(function: Callable[..., torch.Tensor], given: op_calls.Tensors) -> torch.Tensor:
    return function(**given)


def cold_copies(case: OpCase, device: torch.device, given: op_calls.Tensors) -> list[op_calls.Tensors]:
    """The tensors, and as many copies as keep the device's cache cold."""
    count = measure.cold_sets(device, sum(tensor.nbytes for tensor in given.values()))
    return [given, *({name: t.clone() for name, t in given.items()} for _ in range(count - 1))]


def _time(
    case: OpCase,
    options: Options,
    sound: Sequence[Candidate],
    given: op_calls.Tensors,
    left_out: dict[str, str],
    report: suite.Report,
) -> tuple[dict[str, measure.Timing], measure.Ceiling]:
    """Seconds of every sound candidate, eager among them; adds to `judged` a lone call's time and memory."""
    device = options.device
    gpu = device.type == "cuda"
    providers = _providers(case, sound, cold_copies(case, device, given), left_out)
    ceiling = _ceiling(device, case.torch_dtype)
    ceiling.forget()
    clock = clocks.Burst(device) if gpu else clocks.Several(measure.stopwatch(device))
    fitting = _warm_up(list(providers.values()), clock)
    timings = measure.interleave(
        list(providers.values()),
        clock,
        options.repeats or (GPU_ROUNDS if gpu else fitting),
        warmup=0,
        on_round=functools.partial(report, "time"),
        between=measure.sparsely(ceiling.sample, least=3),
    )
    lone = measure.interleave(list(providers.values()), measure.stopwatch(device), CALL_ROUNDS) if gpu else {}
    for one in sound:
        if one.name in providers:
            one.judged["peak_mib"] = measure.peak_mib(providers[one.name], device)
        if one.name in lone:
            one.judged["call_ms"] = statistics.median(lone[one.name].samples) * 1e3
    return timings, ceiling


def _warm_up(providers: Sequence[measure.Provider], clock: Callable[[Callable[[], object]], float]) -> int:
    """One round, and how many like it fit in the budget; a clock's answers leave out how often it calls."""
    start = time.perf_counter()
    measure.interleave(providers, clock, repeats=0, warmup=1)
    fewest, most = ROUNDS
    return max(fewest, min(int(BUDGET_S / (time.perf_counter() - start)), most))


def _providers(
    case: OpCase, sound: Sequence[Candidate], sets: Sequence[op_calls.Tensors], left_out: dict[str, str]
) -> dict[str, measure.Provider]:
    """What can be timed, by name; who runs out of memory with all sets, as SDPA's math may, has that as its note."""
    with torch.no_grad():
        dy = None if case.direction == "forward" else op_calls.upstream(sound[0].function(**sets[0]))
    found = {}
    for one in sound:
        try:
            with one.scope():
                turn = prepare(case, one.function, sets, dy)
                turn()
        except Exception as error:
            if one.peer:
                left_out[one.name] = suite.one_line(error)
            elif isinstance(error, torch.OutOfMemoryError):
                one.judged = {"status": "FAILED", "note": suite.one_line(error)}
            else:
                raise
            continue
        found[one.name] = measure.Provider(one.name, turn, one.scope)
    return found


@functools.lru_cache(maxsize=1)
def _ceiling(device: torch.device, dtype: torch.dtype) -> measure.Ceiling:
    """One for all cases: to make its matrices takes longer than many an op's whole measurement."""
    return measure.Ceiling(device, dtype)


def _row(
    case: OpCase,
    one: Candidate,
    timings: dict[str, measure.Timing],
    ceiling: measure.Ceiling,
) -> dict:
    work = case.work
    moved = work.bytes(case.torch_dtype.itemsize)
    row = {
        "case": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "level": rows_module.OP,
        "provider": one.name,
        "flops": work.flops,
        "bytes": moved,
        "ceiling_gflops": ceiling.gflops,
        "ceiling_gbs": ceiling.gbs,
        "eager": "torch.nn.functional",
        **one.judged,
    }
    timing = timings.get(one.name)
    if timing is not None and timing.samples:
        least = max(work.flops / ceiling.gflops, moved / ceiling.gbs) / 1e9
        row.update(
            median_ms=timing.median * 1e3,
            p20_ms=timing.p20 * 1e3,
            p80_ms=timing.p80 * 1e3,
            repeats=len(timing.samples),
            gflops=work.flops / timing.median / 1e9 if work.flops else None,
            gbs=moved / timing.median / 1e9,
            ceiling_share=least / timing.median,
            ratio=measure.ratio(timings[EAGER], timing) if EAGER in timings else None,
        )
    return row
