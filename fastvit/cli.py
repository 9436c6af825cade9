"""The command line: `python -m fastvit info | bench | bench-ops`, also installed as `fastvit`.

Tables and a progress bar in a terminal, plain aligned rows when piped, JSON on request; exit code 0 only on success.
"""

import difflib
import functools
import importlib
import itertools
import json as json_module
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import rich.console
    import rich.progress
    import typer
except ImportError as missing:
    raise SystemExit(
        f'fastvit: the command line needs typer and rich ({missing}); install them with:  pip install "fastvit[cli]"'
    ) from None

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="Fused Vision Transformers.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class UsageError(Exception):
    """A request that cannot be served; its message is printed without a traceback."""


def main() -> NoReturn:
    """Run the command line and leave with its exit code: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (UsageError, OSError) as error:
        _fail(str(error), 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a wrong option
            raise
        _fail(error.format_message(), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines() or [""]:
        print(f"fastvit: {line}", file=sys.stderr)
    sys.exit(code)


def _benchmarks(module: str) -> Any:
    """A module of the benchmark suite, which costs a second to import and is a folder type checkers do not see."""
    return importlib.import_module(f"fastvit.benchmarks.{module}")


@app.command()
def info(json: Json = False) -> None:
    """Versions, processor, GPUs, and what every backend can do here, or why it cannot."""
    described = {**_benchmarks("environment").describe(), "backends": _backends()}
    if json:
        print(json_module.dumps(described, indent=2))
        return
    for name, lines in _sections(described):
        rich.console.Console(soft_wrap=True, highlight=False, markup=False).print(name, style="bold")
        for left, right in lines:
            print(f"  {left:<14}{right}")


def _backends() -> dict[str, dict[str, Any]]:
    """For each backend: why it is unavailable as a whole, and why for each op; None means that it can run."""
    import torch

    import fastvit
    from fastvit import backends

    gpu = torch.cuda.is_available()
    found: dict[str, dict[str, Any]] = {}
    for name in backends.BACKENDS:
        on_gpu = gpu and name in ("triton", "cuda")
        samples = _sample_calls("cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
        reasons = {op: fastvit.why_not(op, *arguments, backend=name) for op, arguments in samples.items()}
        found[name] = {"why_unavailable": backends.why_unavailable(name), "ops": reasons}
    return found


def _sample_calls(device: str, dtype: Any) -> dict[str, tuple]:
    """ViT-S/16 arguments for the public function of every op; the answers depend on shapes, never on values."""
    import torch

    from fastvit.ops import EncoderBlock

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    x, norm = zeros(1, 197, 384), (zeros(384), zeros(384))
    heads = zeros(1, 6, 197, 64)
    attention = (zeros(1152, 384), zeros(1152), zeros(384, 384), zeros(384))
    mlp = (zeros(1536, 384), zeros(1536), zeros(384, 1536), zeros(384))
    return {
        "patch_embed": (zeros(1, 3, 224, 224), zeros(384, 3, 16, 16), zeros(384)),
        "layer_norm": (x, *norm, 1e-6),
        "attention": (heads, heads, heads),
        "linear": (x, zeros(1152, 384), zeros(1152)),
        "norm_mlp": (x, *norm, *mlp, 1e-6),
        "encoder": (x, [EncoderBlock(*norm, *attention, None, *norm, *mlp, None)], 6),
    }


def _sections(described: dict[str, Any]) -> Iterable[tuple[str, list[tuple[str, str]]]]:
    yield "versions", [(name, value or "not installed") for name, value in described["versions"].items()]
    cpu = described["cpu"]
    machine = [
        ("system", described["system"]),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"),
        ("features", " ".join(cpu["features"]) or "none known"),
    ]
    for gpu in described["gpus"]:
        text = f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB"
        machine.append(("gpu", f"{text}, {gpu['multiprocessors']} multiprocessors"))
    yield "machine", machine if described["gpus"] else [*machine, ("gpu", "none that torch can use")]
    if described["environment"]:
        yield "environment", list(described["environment"].items())
    for name, backend in described["backends"].items():
        can = [op for op, reason in backend["ops"].items() if reason is None]
        lines = [("runs", ", ".join(can) or "nothing here")]
        whole = backend["why_unavailable"]
        if whole:
            lines.append(("unavailable", whole))
        else:
            lines += [(op, reason) for op, reason in backend["ops"].items() if reason is not None]
        yield f"backend {name}", lines


@app.command()
def bench(
    model: Annotated[list[str] | None, typer.Option(help="Model name; repeat it or separate by commas.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch size, likewise.  [default: 1,8]")] = None,
    img_size: Annotated[list[str] | None, typer.Option(help="Side in pixels, likewise.  [default: its own]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, int8, likewise.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward (default), training, likewise.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, likewise.  [default: all that run here]")] = None,
    images: Annotated[Path | None, typer.Option(help="Directory of images.  [default: two photographs]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile of the eager model.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also time other projects' engines, on a CPU.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0 takes as many as fit in 20 s.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file, replacing equal keys.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a chart of the rows: PNG, SVG or PDF.")] = None,
    json: Json = False,
) -> None:
    """Time whole models: eager, torch.compile on request and every fastvit backend, checked against fp64.

    Fails when a provider of fastvit is wrong; such a provider gets no ratio.
    """
    import torch

    cases, photos, charts, tables = map(_benchmarks, ("cases", "images", "plot", "rows"))
    suite, table, engines, measure = map(_benchmarks, ("suite", "table", "engines", "measure"))

    if threads:
        torch.set_num_threads(threads)
    place = _device(device)
    with _as_usage_errors(ValueError, suite.UnavailableError):
        wanted = _cases(cases, model, batch, dtype, direction, img_size)
        dtypes = list(dict.fromkeys(case.dtype for case in wanted))
        chosen, left_out = suite.candidates(
            place, _names(backend, _backend_names(), "backend"), int8=cases.INT8 in dtypes
        )
        if peers and (place.type != "cpu" or any(case.direction != cases.FORWARD for case in wanted)):
            raise UsageError("--peers measures forward passes on a CPU")
        if csv is not None:
            tables.read(csv)
        if plot is not None:
            charts.check_target(plot)
        files = photos.list_images(images) if images else photos.photographs()
    options = suite.Options(
        device=place,
        backends=chosen,
        images=tuple(files),
        images_label=images.resolve().name if images else "scikit-learn's two photographs",
        compile=compile,
        repeats=repeats or None,
        seed=seed,
        engines=engines.ENGINES if peers else (),
    )
    keep = functools.partial(tables.write, csv) if csv else None
    if peers:
        left_out.update(engines.left_out(dtypes))
        for line in measure.peak_lines(place, [case.compute for case in wanted]):  # a busy machine shows at once
            print(line, file=sys.stderr)

    def run(case: Any, report: Callable[..., None]) -> list[dict]:
        measured = suite.run_case(case, options, report)
        left_out.update(measured.left_out)
        return measured.rows

    with _as_usage_errors(photos.ImageError):
        rows = _measure([case.title for case in wanted], [functools.partial(run, case) for case in wanted], keep)
    if plot is not None:
        charts.draw(rows, plot)
    _show(table, rows, left_out, json)
    _refuse_failures("bench", rows)


@app.command()
def bench_ops(
    op: Annotated[list[str] | None, typer.Option(help="Op; repeat it or separate by commas.  [default: all]")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model whose shapes to take, likewise.")] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch size, likewise.")] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="Tokens, likewise.  [default: the model's]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, likewise.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, backward, forward+backward, likewise.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backend, likewise.  [default: all that run here]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="Also time torch.compile of eager.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0: as many as fit in 2 s, on a GPU 25.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the random tensors.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file, replacing equal keys.")] = None,
    json: Json = False,
) -> None:
    """Time single ops, checked against fp64: eager, SDPA's backends, torch.compile on request, every fastvit backend.

    Fails when a provider's output or gradients are wrong; such a provider gets no ratio.
    """
    import torch

    import fastvit

    cases, op_cases, suite = map(_benchmarks, ("cases", "op_cases", "suite"))
    op_suite, tables, table = map(_benchmarks, ("op_suite", "rows", "table"))

    if threads:
        torch.set_num_threads(threads)
    place = _device(device)
    with _as_usage_errors(ValueError, suite.UnavailableError):
        wanted = op_cases.grid(
            place.type == "cuda",
            _names(op, [*op_cases.OPS, *op_cases.GROUPS], "op"),
            _names(model, fastvit.list_models(), "model"),
            _positives(batch, "batch"),
            _names([cases.ALIASES.get(name, name) for name in _split(dtype)], list(cases.DTYPES), "dtype"),
            _names(direction, op_cases.DIRECTIONS, "direction"),
            _positives(tokens, "tokens"),
        )
        chosen, left_out = op_suite.candidates(place, _names(backend, _backend_names(), "backend"))
        if csv is not None:
            tables.read(csv)
    options = op_suite.Options(place, chosen, compile, repeats or None, seed)

    def run(case: Any, report: Callable[..., None]) -> list[dict]:
        measured = op_suite.run_case(case, options, report)
        left_out.update({f"{name} ({case.op} {case.dtype})": why for name, why in measured.left_out.items()})
        return measured.rows

    titles = [f"{case.op} {case.shape} {case.direction}" for case in wanted]
    runs = [functools.partial(run, case) for case in wanted]
    rows = _measure(titles, runs, functools.partial(tables.write, csv) if csv else None)
    _show(table, rows, left_out, json)
    _refuse_failures("bench-ops", rows)


def _measure(
    titles: Sequence[str], runs: Sequence[Callable[..., list[dict]]], keep: Callable[[list[dict]], object] | None
) -> list[dict]:
    """Run the cases under a progress bar; rows are kept case by case, so that an interruption loses only one."""
    rows: list[dict] = []
    with _progress(len(runs)) as step:
        for number, (title, run) in enumerate(zip(titles, runs, strict=True)):
            measured = run(functools.partial(step, number, title))
            rows += measured
            if keep is not None:
                keep(measured)
    return rows


def _refuse_failures(command: str, rows: Iterable[dict]) -> None:
    failed = sorted({row["provider"] for row in rows if row["status"] != "ok"})
    if failed:
        raise UsageError(f"{command}: {', '.join(failed)} FAILED, see above")


def _cases(
    cases: Any,
    model: list[str] | None,
    batch: list[str] | None,
    dtype: list[str] | None,
    direction: list[str] | None,
    img_size: list[str] | None,
) -> list[Any]:
    """Every combination of the models, sizes, dtypes and batch sizes that were asked for."""
    import fastvit

    models = _names(model, fastvit.list_models(), "model") or list(cases.DEFAULT_MODELS)
    spelled = [cases.ALIASES.get(name, name) for name in _split(dtype)]
    dtypes = _names(spelled, list(cases.MODEL_DTYPES), "dtype") or list(cases.DEFAULT_DTYPES)
    batches = _positives(batch, "batch") or list(cases.DEFAULT_BATCHES)
    directions = _names(direction, cases.DIRECTIONS, "direction") or [cases.FORWARD]
    sizes: Sequence[int | None] = _positives(img_size, "img-size") or [None]
    grid = itertools.product(models, directions, sizes, dtypes, batches)
    return [cases.Case(m, b, dtype, way, size) for m, way, size, dtype, b in grid]


def _split(values: Iterable[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _names(values: Iterable[str] | None, valid: Sequence[str], kind: str) -> list[str]:
    """The names that were asked for, each checked; a wrong one is answered with the close or the valid ones."""
    names = list(dict.fromkeys(_split(values)))
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=4, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close and len(valid) > 8 else f"expected {', '.join(valid)}"
            raise UsageError(f"unknown {kind} {name!r}: {hint}")
    return names


def _backend_names() -> list[str]:
    from fastvit import backends

    return ["auto", *backends.BACKENDS]


def _positives(values: Iterable[str] | None, kind: str) -> list[int]:
    wrong = [text for text in _split(values) if not text.isdecimal() or int(text) < 1]
    if wrong:
        raise UsageError(f"{kind} must be a positive whole number, got {wrong[0]!r}")
    return list(dict.fromkeys(int(text) for text in _split(values)))


def _device(name: str) -> Any:
    import torch

    if name not in ("", "cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}: expected cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch finds no usable GPU")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _as_usage_errors(*kinds: type[Exception]) -> Any:
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from None


@contextmanager
def _progress(total: int) -> Any:
    """A bar on stderr while stderr is a terminal; yields step(case number, its title, stage, done, of)."""
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TextColumn("{task.fields[stage]}"),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("starting", total=float(total), stage="")

        def step(number: int, title: str, stage: str, done: int, of: int) -> None:
            share = done / of if stage == "time" else 0.0
            text = f"round {done} of {of}" if stage == "time" else stage
            bar.update(task, completed=number + share, description=f"{number + 1}/{total}  {title}", stage=text)

        yield step


def _show(table: Any, rows: list[dict], left_out: dict[str, str], json: bool) -> None:
    if json:
        clean = [{key: _finite(value) for key, value in row.items()} for row in rows]
        print(json_module.dumps({"rows": clean, "not_measured": left_out}, indent=2))
        return
    console = rich.console.Console(highlight=False)
    if console.is_terminal:
        for one in table.rich_tables(rows, console.width):
            console.print(one)
            console.print()
    else:
        print(table.plain(rows))
    for note in [*table.footnotes(rows, left_out), table.legend(rows)]:
        print(note, file=sys.stdout if console.is_terminal else sys.stderr)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
