"""Run one case: build the providers, check that they agree, time them against each other, make rows."""

import contextlib
import copy
import functools
import gc
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from . import accuracy, cases, environment, images, measure, peers, training
from .engines import Engine
from .rows import is_ours

EAGER, COMPILE, HEADLINE = "eager", "compile", "fastvit"
INT8_BACKENDS = ("auto", "cpu")

# told (stage, steps done, steps in all)
Report = Callable[[str, int, int], None]


class UnavailableError(RuntimeError):
    """A backend that was asked for by name cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Options:
    """How to measure.

    device: where. backends: provider names, "auto" among them. compile: also time torch.compile of the eager model.
    repeats: timed rounds, None for as many as fit in budget_s. seed: of the random weights. images: files to use, in
    order. images_label: what the rows call them. engines: others to compare with.
    """

    device: torch.device
    backends: tuple[str, ...]
    images: tuple
    images_label: str
    compile: bool = False
    repeats: int | None = None
    seed: int = 0
    engines: tuple[Engine, ...] = ()
    budget_s: float = measure.BUDGET_S


@dataclass(frozen=True)
class Measured:
    """The rows of a case, eager first, and for each engine that was asked for and broke the reason."""

    rows: list[dict]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Judged:
    """A provider, the call whose result (logits or a gradient) is compared with fp64, and whether it is a peer's.

    A peer that is wrong keeps its speed, with a note; a peer that breaks is left out.
    """

    provider: measure.Provider
    result: Callable[[], torch.Tensor]
    peer: bool = False


def why_not_measured(backend: str, device: torch.device, whole_model: bool = True) -> str | None:
    """Why a backend is no speed candidate on this device, for whole models or single ops, or None when it is."""
    import fastvit.backends

    if backend == "auto":
        return None
    if backend == "triton" and (device.type == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"):
        return "Triton would run interpreted, which says nothing about its speed"
    reason = fastvit.backends.why_unavailable(backend)
    if reason is not None:
        return reason
    if backend in ("cpu", "cuda") and backend != device.type:
        return f"its kernels do not run on {device.type} tensors"
    # Blocks that no kernel computes whole run op by op.
    wanted = {op: served for op, served in fastvit.backends.OPS.items() if op != "encoder"}
    lacking = [op for op, served in wanted.items() if backend not in ("reference", *served)]
    if lacking and whole_model:
        return f"{backend} has no kernel yet for {', '.join(lacking)}; auto uses those it has"
    return None


def candidates(
    device: torch.device, requested: Sequence[str], whole_model: bool = True, int8: bool = False
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends to measure and, for those left out, the reason. int8: whether a case needs the kernels for it.

    Raises:
        UnavailableError: a backend that was requested by name is no candidate here, no kernel computes in int8 here,
            or fastvit is switched off.
    """
    import fastvit.backends

    if fastvit.backends.SETTINGS.disable:
        raise UnavailableError("the environment switches fastvit off, so there is nothing to compare with eager")
    if int8:
        reason = why_not_measured("cpu", device) or next(
            (f"{name} has none" for name in requested if name not in INT8_BACKENDS), None
        )
        if reason is not None:
            raise UnavailableError(f"int8 needs the cpu backend's kernels: {reason}")
    if requested:
        refused = {name: reason for name in requested if (reason := why_not_measured(name, device, whole_model))}
        if refused:
            raise UnavailableError(
                "; ".join(f"backend {name} cannot be measured here: {why}" for name, why in refused.items())
            )
        return tuple(dict.fromkeys(requested)), {}
    reasons = {name: why_not_measured(name, device, whole_model) for name in fastvit.backends.BACKENDS}
    available = [name for name, reason in reasons.items() if reason is None and name != "reference"]
    return ("auto", *available, "reference"), {name: reason for name, reason in reasons.items() if reason}


def provider_name(backend: str) -> str:
    """What a backend is called in rows: "fastvit" for auto, the headline, else "fastvit-cpu" and so on."""
    return HEADLINE if backend == "auto" else f"{HEADLINE}-{backend}"


def run_case(case: cases.Case, options: Options, report: Report = lambda stage, done, total: None) -> Measured:
    """Measure one case. A row that is not "ok" carries no speed."""
    report("build", 0, 1)
    if options.compile or options.engines:
        torch.compiler.reset()  # deep copies share its cache: a variant could silently reuse another one's graph
    base = _baseline(case.model, options.seed, case.img_size)
    batch, exact = _work(case, options, base)
    clock = measure.stopwatch(options.device)
    candidates, failures, left_out = _candidates(case, options, base, batch)
    ceiling = measure.Ceiling(options.device, case.compute)
    with contextlib.nullcontext() if case.direction == cases.TRAINING else torch.inference_mode():
        outcome, broken = _check(case, candidates, failures, exact, report)
        sound = [one.provider for one in candidates if one.provider.name in outcome]
        sound = [provider for provider in sound if outcome[provider.name]["status"] == "ok"]
        timings = measure.interleave(
            sound,
            measure.settled(clock) if options.engines else clock,
            options.repeats,
            warmup=1 if options.engines else measure.WARMUP_ROUNDS,  # beside engines a clock warms up by itself
            on_round=functools.partial(report, "time"),
            between=ceiling.sample,
            budget_s=options.budget_s,
        )
        for provider in sound:
            outcome[provider.name]["peak_mib"] = measure.peak_mib(provider, options.device)
    rows = _rows(case, options, base, outcome, timings, ceiling)
    del candidates, sound, batch, exact
    gc.collect()
    return Measured(rows, left_out | broken)


def sound_providers(case: cases.Case, options: Options) -> tuple[dict[str, measure.Provider], dict[str, str]]:
    """For a clock of somebody else's: who has passed the check, by name, and why the others are not there."""
    base = _baseline(case.model, options.seed, case.img_size)
    batch, exact = _work(case, options, base)
    candidates, failures, left_out = _candidates(case, options, base, batch)
    outcome, broken = _check(case, candidates, failures, exact, lambda stage, done, total: None)
    found = {one.provider.name: one.provider for one in candidates}
    reasons = {name: f"FAILED: {judged['note']}" for name, judged in outcome.items() if judged["status"] != "ok"}
    return {n: one for n, one in found.items() if n in outcome and n not in reasons}, left_out | broken | reasons


@functools.lru_cache(maxsize=1)
def _baseline(name: str, seed: int, img_size: int | None) -> peers.Baseline:
    return peers.baseline(name, seed, img_size)


def _work(case: cases.Case, options: Options, base: peers.Baseline) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch on the device, and what fp64 makes of it: logits, or the gradient of the first images.

    Images repeat to fill the batch, and their logits are computed once in fp64.
    """
    import fastvit

    height, width = cases.pair(case.config.img_size)
    if height != width:
        raise ValueError(f"bench: {case.model} takes {height} x {width} images, expected a square")
    files = options.images[: case.batch]
    pixels = images.load(files, height, base.crop_pct, base.mean, base.std).to(options.device, case.torch_dtype)
    order = torch.arange(case.batch, device=options.device) % len(files)
    rounded = copy.deepcopy(base.model).to(options.device, case.torch_dtype)
    with fastvit.backend("reference"):
        if case.direction == cases.TRAINING:
            return pixels[order], training.exact_gradient(rounded, pixels[order], _labels(case, options))
        return pixels[order], accuracy.exact_logits(rounded.double(), pixels)[order]


def _labels(case: cases.Case, options: Options) -> torch.Tensor:
    return training.labels(case.batch, case.config.num_classes, options.seed, options.device)


def _candidates(
    case: cases.Case, options: Options, base: peers.Baseline, batch: torch.Tensor
) -> tuple[list[Judged], dict[str, str], dict[str, str]]:
    """Who takes part, all with one set of weights, and why others could not be built: fastvit's own, then peers."""
    import fastvit

    eager = copy.deepcopy(base.model).to(options.device, case.torch_dtype).train(case.direction == cases.TRAINING)
    training_step = case.direction == cases.TRAINING
    judged = functools.partial(_judged, case, options, training.optimizer(eager) if training_step else None)
    reference_scope = functools.partial(fastvit.backend, "reference")
    note = "PyTorch has no int8 for a ViT without another package: eager is float32" if case.dtype == cases.INT8 else ""
    found = [judged(EAGER, eager, batch, reference_scope, note)]
    if options.compile:  # static: the gradients are checked on fewer images than the step is timed on
        compiled = torch.compile(_twin(eager), dynamic=False if training_step else None)
        found.append(judged(COMPILE, compiled, batch, reference_scope))
    failures: dict[str, str] = {}
    for name in options.backends:
        if case.dtype == cases.INT8 and name not in INT8_BACKENDS:
            continue
        scope = functools.partial(fastvit.backend, name)
        try:
            with scope():
                found.append(_accelerated(judged, case, name, eager, batch, scope))
        except Exception as error:
            failures[provider_name(name)] = one_line(error)
    left_out: dict[str, str] = {}
    for engine in options.engines:
        if engine.why_not(case.dtype, options.device.type) is None:
            try:
                built = engine.build(_twin(eager), batch, case.dtype)
                found += [Judged(one, one.run, peer=not is_ours(one.name)) for one in built]
            except Exception as error:
                left_out |= {f"{name} ({case.title})": one_line(error) for name in engine.names}
    return found, failures, left_out


def _accelerated(
    judged: Callable[..., Judged],
    case: cases.Case,
    backend: str,
    eager: torch.nn.Module,
    batch: torch.Tensor,
    scope: Callable[[], AbstractContextManager],
) -> Judged:
    import fastvit

    if case.dtype != cases.INT8:
        return judged(provider_name(backend), fastvit.accelerate(_twin(eager)), batch, scope)
    model = fastvit.accelerate(copy.deepcopy(eager).bfloat16())
    layers = fastvit.quantize(model)
    note = f"{sum(layer.int8 for layer in layers)} of {len(layers)} linear layers in int8, the rest bfloat16"
    return judged(provider_name(backend), model, batch.bfloat16(), scope, note)


def _judged(
    case: cases.Case,
    options: Options,
    optimizer: torch.optim.Optimizer | None,
    name: str,
    model: torch.nn.Module,
    batch: torch.Tensor,
    scope: Callable[[], AbstractContextManager],
    note: str = "",
) -> Judged:
    """A model's forward pass, or its training step."""
    if case.direction == cases.FORWARD:
        provider = measure.Provider(name, functools.partial(model, batch), scope, note=note)
        return Judged(provider, provider.run)
    autocast = None if case.compute == case.torch_dtype else case.compute
    step = training.Step(model, batch, _labels(case, options), autocast, optimizer)
    return Judged(measure.Provider(name, step, scope, note=note), step.gradient)


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules around the same parameters: equal weights at equal addresses, and memory for one model."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _check(
    case: cases.Case,
    candidates: Sequence[Judged],
    failures: dict[str, str],
    exact: torch.Tensor,
    report: Report,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Run each provider once and judge its result: by name status, note and the errors; and why a peer broke."""
    outcome: dict[str, dict] = {}
    broken: dict[str, str] = {}
    eager: accuracy.Accuracy | None = None
    for number, one in enumerate(candidates):
        name = one.provider.name
        report(f"check {name}", number, len(candidates))
        try:
            with one.provider.scope():
                got = accuracy.compare(one.result(), exact)
        except Exception as error:  # one provider that breaks must not hide the others
            if name == EAGER:
                raise
            if one.peer:
                broken[f"{name} ({case.title})"] = one_line(error)
            else:
                outcome[name] = {"status": "FAILED", "note": one_line(error)}
            continue
        eager = eager or got
        reason = _why_red(case, got, eager, exact)
        comparable = case.dtype != cases.INT8 or got is eager
        outcome[name] = {
            "status": "FAILED" if reason and not one.peer else "ok",
            "note": "; ".join(filter(None, (one.provider.note, reason))),
            "max_error": got.max_error,
            "relative_error": got.relative,
            "error_ratio": got.max_error / eager.max_error if comparable and eager.max_error > 0 else None,
            "top1_agreement": got.top1,
        }
    for name, why in failures.items():
        outcome[name] = {"status": "FAILED", "note": why}
    return outcome, broken


def _why_red(case: cases.Case, got: accuracy.Accuracy, eager: accuracy.Accuracy, exact: torch.Tensor) -> str | None:
    if case.direction == cases.TRAINING:
        return accuracy.why_red_gradient(got, eager)
    if got is eager:  # in int8 it computes in another dtype; NaN and infinity are all that it can do wrong
        return accuracy.why_red(case.torch_dtype, got, eager, float(exact.abs().max()))
    return accuracy.why_red(case.compute, got, eager, float(exact.abs().max()))


def _rows(
    case: cases.Case,
    options: Options,
    base: peers.Baseline,
    outcome: dict[str, dict],
    timings: dict[str, measure.Timing],
    ceiling: measure.Ceiling,
) -> list[dict]:
    common = {
        "case": case.model,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "flops": case.flops,
        "bytes": case.bytes,
        "ceiling_gflops": ceiling.gflops,
        "ceiling_gbs": ceiling.gbs,
        "eager": base.source,
        "images": options.images_label,
        **environment.stamp(options.device),
    }
    rows = []
    for name, judged in outcome.items():
        row = {**common, "provider": name, **judged}
        timing = timings.get(name)
        if timing is not None and timing.samples:
            row.update(
                median_ms=timing.median * 1e3,
                p20_ms=timing.p20 * 1e3,
                p80_ms=timing.p80 * 1e3,
                repeats=len(timing.samples),
                images_per_s=case.batch / timing.median,
                gflops=case.flops / timing.median / 1e9,
                ceiling_share=case.flops / timing.median / 1e9 / ceiling.gflops,
                ratio=measure.ratio(timings[EAGER], timing) if EAGER in timings else None,
            )
        rows.append(row)
    if base.why_not_timm:
        stand_in = f"fastvit's reference stands in for timm: {base.why_not_timm}"
        rows[0]["note"] = "; ".join(filter(None, (rows[0]["note"], stand_in)))
    return rows


def one_line(error: BaseException) -> str:
    """An exception as it stands in a row's note."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]
