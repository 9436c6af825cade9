"""Run one case: build the providers, check that they agree, time them against each other, make rows."""

import copy
import functools
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import accuracy, cases, environment, images, measure, peers

EAGER, COMPILE, HEADLINE = "eager", "compile", "fastvit"

# told (stage, steps done, steps in all)
Report = Callable[[str, int, int], None]


class UnavailableError(RuntimeError):
    """A backend that was asked for by name cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Options:
    """How to measure.

    device: where. backends: provider names, "auto" among them. compile: also time torch.compile of the eager model.
    repeats: timed rounds, None for as many as fit. seed: of the random weights. images: files to use, in order.
    images_label: what the rows call them.
    """

    device: torch.device
    backends: tuple[str, ...]
    images: tuple
    images_label: str
    compile: bool = False
    repeats: int | None = None
    seed: int = 0


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
    lacking = [op for op, served in fastvit.backends.OPS.items() if backend not in ("reference", *served)]
    if lacking and whole_model:
        return f"{backend} has no kernel yet for {', '.join(lacking)}; auto uses those it has"
    return None


def candidates(
    device: torch.device, requested: Sequence[str], whole_model: bool = True
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends to measure and, for those left out, the reason.

    Raises:
        UnavailableError: a backend that was requested by name is no candidate here, or fastvit is switched off.
    """
    import fastvit.backends

    if fastvit.backends.SETTINGS.disable:
        raise UnavailableError("the environment switches fastvit off, so there is nothing to compare with eager")
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


def run_case(case: cases.Case, options: Options, report: Report = lambda stage, done, total: None) -> list[dict]:
    """Measure one case and return its rows, eager first. A row that is not "ok" carries no speed."""
    report("build", 0, 1)
    if options.compile:
        torch.compiler.reset()  # deep copies share its cache: a variant could silently reuse another one's graph
    base = _baseline(case.model, options.seed)
    batch, exact = _work(case, options, base)
    providers, failures = _providers(case, options, base, batch)
    outcome = _check(case, providers, failures, exact, report)
    sound = [provider for provider in providers if outcome[provider.name]["status"] == "ok"]
    ceiling = measure.Ceiling(options.device, case.torch_dtype)
    with torch.inference_mode():
        timings = measure.interleave(
            sound,
            measure.stopwatch(options.device),
            options.repeats,
            on_round=functools.partial(report, "time"),
            between=ceiling.sample,
        )
        for provider in sound:
            outcome[provider.name]["peak_mib"] = measure.peak_mib(provider, options.device)
    rows = _rows(case, options, base, outcome, timings, ceiling)
    del providers, sound, batch, exact
    gc.collect()
    return rows


@functools.lru_cache(maxsize=1)
def _baseline(name: str, seed: int) -> peers.Baseline:
    return peers.baseline(name, seed)


def _work(case: cases.Case, options: Options, base: peers.Baseline) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch on the device, and its fp64 logits; images repeat to fill the batch, and are computed once in fp64."""
    import fastvit

    height, width = cases.pair(_config(case.model).img_size)
    if height != width:
        raise ValueError(f"bench: {case.model} takes {height} x {width} images, expected a square")
    files = options.images[: case.batch]
    pixels = images.load(files, height, base.crop_pct, base.mean, base.std).to(options.device, case.torch_dtype)
    order = torch.arange(case.batch, device=options.device) % len(files)
    with fastvit.backend("reference"):
        exact_model = copy.deepcopy(base.model).to(case.torch_dtype).double().to(options.device)
        exact = accuracy.exact_logits(exact_model, pixels)
    return pixels[order], exact[order]


def _config(name: str):
    import fastvit.config

    return fastvit.config.PRESETS[name]


def _providers(
    case: cases.Case, options: Options, base: peers.Baseline, batch: torch.Tensor
) -> tuple[list[measure.Provider], dict[str, str]]:
    """The providers of a case, which share one set of weights, and why others could not be built."""
    import fastvit

    eager = copy.deepcopy(base.model).to(options.device, case.torch_dtype)
    reference_scope = functools.partial(fastvit.backend, "reference")
    providers = [measure.Provider(EAGER, functools.partial(eager, batch), reference_scope)]
    if options.compile:
        compiled = torch.compile(_twin(eager))
        providers.append(measure.Provider(COMPILE, functools.partial(compiled, batch), reference_scope))
    failures = {}
    for name in options.backends:
        scope = functools.partial(fastvit.backend, name)
        try:
            with scope():
                model = fastvit.accelerate(_twin(eager))
        except Exception as error:
            failures[provider_name(name)] = one_line(error)
            continue
        providers.append(measure.Provider(provider_name(name), functools.partial(model, batch), scope))
    return providers, failures


def _twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules around the same parameters: equal weights at equal addresses, and memory for one model."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _check(
    case: cases.Case,
    providers: Sequence[measure.Provider],
    failures: dict[str, str],
    exact: torch.Tensor,
    report: Report,
) -> dict[str, dict]:
    """Run each provider once and judge its logits: status, note, max_error, error_ratio, top1_agreement by name."""
    outcome: dict[str, dict] = {}
    eager: accuracy.Accuracy | None = None
    for number, provider in enumerate(providers):
        report(f"check {provider.name}", number, len(providers))
        try:
            with torch.inference_mode(), provider.scope():
                got = accuracy.compare(provider.run(), exact)
        except Exception as error:  # one provider that breaks must not hide the others
            outcome[provider.name] = {"status": "FAILED", "note": one_line(error)}
            if provider.name == EAGER:
                raise
            continue
        eager = eager or got
        reason = accuracy.why_red(case.torch_dtype, got, eager, float(exact.abs().max()))
        outcome[provider.name] = {
            "status": "FAILED" if reason else "ok",
            "note": reason or "",
            "max_error": got.max_error,
            "error_ratio": got.max_error / eager.max_error if eager.max_error > 0 else None,
            "top1_agreement": got.top1,
        }
    for name, reason in failures.items():
        outcome[name] = {"status": "FAILED", "note": reason}
    return outcome


def _rows(
    case: cases.Case,
    options: Options,
    base: peers.Baseline,
    outcome: dict[str, dict],
    timings: dict[str, measure.Timing],
    ceiling: measure.Ceiling,
) -> list[dict]:
    config = _config(case.model)
    flops = cases.flops(config, case.batch)
    common = {
        "case": case.model,
        "shape": case.shape(config),
        "dtype": case.dtype,
        "direction": "forward",
        "flops": flops,
        "bytes": cases.traffic(config, case.batch, case.torch_dtype),
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
                gflops=flops / timing.median / 1e9,
                ceiling_share=flops / timing.median / 1e9 / ceiling.gflops,
                ratio=timings[EAGER].median / timing.median if EAGER in timings else None,
            )
        rows.append(row)
    if base.why_not_timm:
        rows[0]["note"] = f"fastvit's reference stands in for timm: {base.why_not_timm}"
    return rows


def one_line(error: BaseException) -> str:
    """An exception as it stands in a row's note."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]
