"""Where a pass spends its time: the times of its ops, the table made of them, and that looking changes nothing."""

import io
import json
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType

import fastvit
from fastvit import backends, cli
from fastvit.benchmarks import call_work, cases, profile, profile_lines, profile_table, recording

TINY = "vit_tiny_patch16_224"
CPU = torch.device("cpu")
Call, Line, Operand = recording.Call, profile_lines.Line, recording.Operand

needs_kernels = pytest.mark.skipif(not backends.is_available("cpu"), reason="the extension is not built")


def subject(backend: str, direction: str, by_op: bool = False) -> profile.Subject:
    case = cases.Case(TINY, 2, "float32", direction)
    options = profile.Options(CPU, (backend,), depth=2)
    found = profile._subject(case, options, profile._baseline(TINY, 0, None), backend)
    scope = found.scope
    return replace(found, scope=lambda: profile._by_op(scope)) if by_op else found


def seen_by_a_profiler(one: profile.Subject) -> list[str]:
    """fastvit's ops in a pass, as the profiler alone sees them."""
    with recording.quiet(), torch.profiler.profile() as profiler:
        one.run()
    return [event.name for event in profiler.events() if event.name.startswith(recording.OURS)]


WAYS = [("eager", "forward"), ("auto", "forward"), ("eager", "training"), ("auto", "training")]


@needs_kernels
@pytest.mark.parametrize(("backend", "direction"), WAYS)
@pytest.mark.parametrize("by_op", [False, True])
def test_a_models_ops_hold_its_work(backend: str, direction: str, by_op: bool) -> None:
    one = subject(backend, direction, by_op=by_op)
    with one.scope():
        one.run()
        found = recording.record(one.run).calls
    config = replace(fastvit.PRESETS[TINY], depth=2)
    expected = cases.flops(config, 2)
    if direction == "training":
        # A backward of attention computes the scores again; images need no gradient.
        attention = 4 * 2 * config.depth * cases.tokens(config) ** 2 * config.embed_dim
        embedding = 2 * 2 * cases.patches(config) * cases.patch_values(config) * config.embed_dim
        expected = 3 * expected + attention // 2 - embedding
    assert sum(call_work.flops_of(call) or 0 for call in found) == expected
    whole = {call.name for call in found} & set(profile.WHOLE_BLOCKS)
    assert bool(whole) == (backend == "auto" and not by_op)


@needs_kernels
@pytest.mark.parametrize("direction", ["forward", "training"])
def test_recording_changes_nothing(direction: str) -> None:
    one = subject("auto", direction)
    with one.scope():
        for _ in range(profile.WARMUP):
            one.run()
        alone = seen_by_a_profiler(one)
        both: list[list[str]] = []
        seen = recording.record(lambda: both.append(seen_by_a_profiler(one)))
        assert both == [alone]
        assert {"fastvit_native::encoder", "fastvit::block"} & {call.name for call in seen.calls}
        timed = profile.time_calls(one.run, seen, CPU, 2)
    assert len(timed.seconds) == len(seen.calls)
    assert seen_by_a_profiler(one) == alone


def test_the_registry_is_whole_again_behind_a_pass_op_by_op() -> None:
    before = dict(backends.OPS)

    def fail() -> None:
        with profile._by_op(lambda: fastvit.backend("reference")):
            assert backends.OPS["encoder"] == ()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert before == backends.OPS


def test_times_are_the_calls_own_and_add_up() -> None:
    large, small = torch.randn(500, 500), torch.randn(50, 50)

    def run() -> None:
        with torch.inference_mode():
            for matrix in (large, small, large):
                torch.mm(matrix, matrix)

    run()
    seen = recording.record(run)
    timed = profile.time_calls(run, seen, CPU, 3)
    assert timed.passes == 3
    assert all(outside > 0 for outside in timed.outside)
    found = profile_lines.lines_of(seen.calls, timed, "float32")
    assert [(line.op, line.shape, line.calls) for line in found] == [
        ("aten::mm", "500x500", 2),
        ("aten::mm", "50x50", 1),
    ]
    assert (found[0].flops, found[0].bytes) == (4 * 500**3, 2 * 2 * 4 * 500**2)
    assert found[0].seconds > 5 * found[1].seconds > 0


def test_the_parts_of_a_pass_are_its_time() -> None:
    case = cases.Case(TINY, 1, "float32")
    (found,) = profile.run_case(case, profile.Options(CPU, ("eager",), depth=1, repeats=5))
    parts = sum(line.seconds for line in found.lines)
    assert found.total == pytest.approx(parts + found.outside)
    assert 0 < found.outside < found.total
    told = profile_table.as_dict(found)
    assert sum(line["share"] for line in told["lines"]) + found.outside / found.total == pytest.approx(1)
    assert found.title == f"{TINY} batch 1 float32 1 of 12 blocks"
    with pytest.raises(ValueError, match="12 blocks"):
        profile.run_case(case, profile.Options(CPU, ("eager",), depth=13))
    with pytest.raises(ValueError, match="int8"):
        profile.run_case(replace(case, dtype="int8"), profile.Options(CPU, ("auto",), by_op=True))


@dataclass
class Event:
    """What the profiler tells of an op, a range or a kernel, as far as it is read."""

    name: str
    start: float
    end: float
    kernels: list[Any] = field(default_factory=list)
    cpu_children: list["Event"] = field(default_factory=list)
    device_type: DeviceType = DeviceType.CPU

    @property
    def time_range(self) -> Any:
        return SimpleNamespace(start=self.start, end=self.end, elapsed_us=lambda: self.end - self.start)

    @property
    def tree(self) -> list["Event"]:
        return [self, *(event for child in self.cpu_children for event in child.tree)]


def kernel(name: str, us: float) -> Any:
    return SimpleNamespace(name=name, device=0, duration=us)


def gpu_pass(at: float, slower: float = 0.0) -> list[Event]:
    """Two ops, one launching through another, a copy on no op's account, and the kernels themselves."""
    launch = Event("cudaLaunchKernel", at + 2, at + 3)
    inner = Event("aten::mm", at + 1, at + 4, [kernel("gemm", 30 + slower)], [launch])
    product = Event("aten::addmm", at, at + 6, [kernel("bias", 5)], [inner])
    norm = Event("aten::mm", at + 7, at + 8, [kernel("gemm", 100)])
    stray = Event("aten::item", at + 8, at + 9, [kernel("Memcpy DtoH", 1)])
    device = Event("aten::mm", at + 9, at + 139, device_type=DeviceType.CUDA)
    return [*norm.tree, *stray.tree, device, *product.tree]


def operand(*shape: int, storage: int = 0) -> Operand:
    strides = tuple(torch.empty(shape, device="meta").stride())
    return Operand(storage, 0, shape, strides, "float32", 4)


ADDMM = Call(
    torch.ops.aten.addmm.default,
    (operand(4, storage=1), operand(3, 2), operand(2, 4), 1, 1),
    (operand(3, 4, storage=2),),
)
MM = Call(torch.ops.aten.mm.default, (operand(3, 2), operand(2, 4, storage=1)), (operand(3, 4, storage=2),))
GPU_PASS = recording.Recording((("aten::addmm", ADDMM), ("aten::mm", None), ("aten::mm", MM)))


def test_a_gpus_times_are_those_of_the_kernels_below_an_op() -> None:
    events = gpu_pass(1000, slower=4) + gpu_pass(0) + gpu_pass(2000, slower=1)
    timed = profile.read_events(events, GPU_PASS, [1.0, 1.0, 1.0], gpu=True)
    assert timed.seconds == [pytest.approx([35e-6, 39e-6, 36e-6]), pytest.approx([100e-6] * 3)]
    second, first = profile_lines.lines_of(GPU_PASS.calls, timed, "float32")[::-1]
    assert (first.op, second.op) == ("aten::mm", "aten::addmm")
    assert second.seconds == pytest.approx(36e-6)
    assert [(k.name, k.launches, round(k.seconds * 1e6, 3)) for k in second.kernels] == [
        ("gemm", 1, round(95 / 3, 3)),
        ("bias", 1, 5),
    ]
    on_cpu = profile.read_events(events, GPU_PASS, [1.0, 1.0, 1.0], gpu=False)
    assert on_cpu.seconds == [pytest.approx([6e-6] * 3), pytest.approx([1e-6] * 3)]
    assert on_cpu.outside == pytest.approx([1 - 7e-6] * 3)
    assert on_cpu.kernels == [[], []]


def test_passes_that_ran_other_ops_are_no_passes() -> None:
    fewer = [event for event in gpu_pass(0) if event.name != "aten::addmm"]
    with pytest.raises(RuntimeError, match="different ops"):
        profile.read_events(fewer, GPU_PASS, [1.0], gpu=True)
    other = [replace(event, name="aten::mm" if event.name == "aten::addmm" else event.name) for event in gpu_pass(0)]
    with pytest.raises(RuntimeError, match="different ops"):
        profile.read_events(other, GPU_PASS, [1.0], gpu=True)


ROOF = profile_lines.Roof(gflops=100.0, gbs=10.0)
LINES = (
    Line("aten::mm", "10x10", 2, 4e-3, 1_000_000, 200_000_000, (profile_lines.Kernel("void gemm<4>", 2, 4e-3),)),
    Line("aten::add", "10x10", 1, 1e-3, 20_000_000, 0),
    Line("fastvit_native::fingerprint", "-", 1, 5e-6, 0, 0),
)
PROFILE = profile_lines.Profile("a model", "forward", "fastvit", LINES, 1e-3, 6.5e-3, 5, ROOF)


def test_a_lines_roof_is_what_its_work_allows() -> None:
    assert LINES[0].least(ROOF) == (pytest.approx(2e-3), "arithmetic")
    assert LINES[0].lost(ROOF) == pytest.approx(2e-3)
    assert LINES[1].least(ROOF) == (pytest.approx(2e-3), "memory")
    assert LINES[1].lost(ROOF) == 0, "a cache is faster than a copy"
    assert LINES[2].least(ROOF) == (0, "")
    told = profile_table.as_dict(PROFILE)["lines"]
    assert [line["roof"] for line in told] == [pytest.approx(0.5), pytest.approx(2.0), None]
    assert [line["bound"] for line in told] == ["arithmetic", "memory", None]
    assert (told[0]["gflops"], told[0]["gbs"]) == (pytest.approx(50), pytest.approx(0.25))


def test_the_table_and_what_to_do_next() -> None:
    text = profile_table.plain([PROFILE, replace(PROFILE, provider="eager")])
    lines = [line.split() for line in text.splitlines()]
    assert {len(line) for line in lines} == {12}
    assert [line[2] for line in lines[1:8]] == [
        "aten::mm", "kernel:void_gemm<4>", "aten::add", "1_more", "outside", "total", "clock",
    ]  # fmt: skip
    assert lines[1][3:] == ["10x10", "2", "4.000", "66.6%", "50.0", "0.2", "1.0", "50%", "arithmetic"]
    assert lines[3][10] == "200%"
    assert sum(float(line[5]) for line in lines[1:6] if "kernel" not in line[2]) == pytest.approx(float(lines[6][5]))
    advice = profile_table.advice(PROFILE)
    assert advice.startswith("next: aten::mm 10x10, 2.00 of 4.00 ms lost, at 50% of its roof, bound by arithmetic; ")
    assert "4.00 of 6.00 ms" in advice
    assert profile_table.advice(replace(PROFILE, outside=3e-3)).startswith("next: what is outside the ops, 3.00 ms")
    assert len(profile_table.footnotes([PROFILE])) == 1
    assert "busy" in profile_table.footnotes([replace(PROFILE, noise=1.5)])[-1]
    console = Console(width=100, file=io.StringIO())
    console.print(profile_table.rich_table(PROFILE))
    assert "void gemm<4>" in console.file.getvalue()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `fastvit profile` in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvit", "profile", "--device", "cpu", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return call


SMALL = ("--model", TINY, "--depth", 1, "--repeats", 2)


def test_the_command_prints_a_table(run, tmp_path) -> None:
    code, out, err = run(*SMALL, "--backend", "eager,reference", "--trace", tmp_path / "t.json")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:4] == ["direction", "provider", "op", "shape"]
    assert {line[1] for line in lines[1:]} == {"eager", "fastvit-reference"}
    assert {"outside", "total", "clock", "aten::addmm"} <= {line[2] for line in lines}
    assert err.count("next: ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t-eager-forward.json",
        "t-fastvit-reference-forward.json",
    ]
    assert json.loads((tmp_path / "t-eager-forward.json").read_text())["traceEvents"]


@needs_kernels
def test_the_command_speaks_json_and_goes_op_by_op(run) -> None:
    code, out, err = run(*SMALL, "--direction", "training", "--dtype", "bf16", "--by-op", "--backend", "auto", "--json")
    assert code == 0, err
    whole, by_op = json.loads(out)["profiles"]
    assert (whole["provider"], by_op["provider"]) == ("fastvit", "fastvit-by-op")
    assert "op by op, which is not how they run" in by_op["note"]
    assert {"fastvit::block", "fastvit::block_backward"} <= {line["op"] for line in whole["lines"]}
    assert {"fastvit::linear_backward", "fastvit::attention"} <= {line["op"] for line in by_op["lines"]}
    assert whole["title"].startswith(f"{TINY} batch 1 bfloat16 training")
    assert whole["next"].startswith("next: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "vit_tinny_patch16_224"), ("vit_tinny_patch16_224", TINY)),
        (("--backend", "opencl"), ("opencl", "eager, auto, reference, triton, cuda, cpu")),
        (("--backend", "triton"), ("triton", "interpreted")),
        (("--dtype", "int4"), ("int4", "float32, bfloat16, float16, int8")),
        (("--direction", "backwards"), ("backwards", "forward, training")),
        (("--model", TINY, "--depth", "13"), (TINY, "12 blocks", "13")),
        (("--img-size", "225"), ("225", "16")),
        (("--dtype", "int8", "--direction", "training"), ("training", "int8")),
        (("--model", TINY, "--dtype", "int8", "--by-op"), ("int8", "op by op")),
        (("--trace", "/nowhere/t.json"), ("/nowhere",)),
    ],
)
def test_the_command_refuses_in_one_line(run, arguments: tuple, words: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err
