"""The op-level benchmark: its rule against the tests' own, turns, rounds, rows, the command."""

import json
import math

import pytest
import tolerances
import torch
from tiny_ops import CPU, tiny

import fastvit
from fastvit import cli
from fastvit.benchmarks import (
    accuracy,
    measure,
    op_calls,
    op_cases,
    op_suite,
    plot,
    rows,
    suite,
    table,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DIRECTIONS = ("forward", "backward")


def perturbed(exact: torch.Tensor, eager: torch.Tensor, kind: str) -> torch.Tensor:
    error = eager.double() - exact
    changed = {
        "eager": error,
        "a little more": 1.4 * error,
        "twice and more": 2.3 * error,
        "five times": 5 * error,
        "scaled": 0.5 * exact,
        "nothing": -exact,
    }
    result = (exact + changed.get(kind, error)).to(eager.dtype)
    if kind in ("nan", "inf", "one element"):
        result[1, 2] = {"nan": math.nan, "inf": math.inf, "one element": 1.5 * exact.abs().max()}[kind]
    return result


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_is_the_tests_own(dtype: torch.dtype, gradient: bool) -> None:
    for scale in (1.0, 300.0):
        exact = scale * torch.randn(40, 30, dtype=torch.float64)
        eager = (exact + scale * 1e-3 * torch.randn(40, 30, dtype=torch.float64)).to(dtype)
        verdicts = {}
        for kind in ("eager", "a little more", "twice and more", "five times", "scaled", "nothing", "nan", "inf",
                     "one element"):  # fmt: skip
            got = perturbed(exact, eager, kind)
            error, _, reason = accuracy.judge(got, exact, eager, gradient)
            assert (reason is None) == (tolerances.compare(got, exact, eager, gradient) is None), kind
            verdicts[kind] = reason is None
            if reason is None:
                assert error == pytest.approx((got.double() - exact).abs().max().item())
        assert verdicts["eager"]
        assert not any(verdicts[kind] for kind in ("five times", "scaled", "nothing", "nan", "inf", "one element"))
    assert accuracy.judge(exact, exact, eager, gradient)[2] is not None  # another dtype
    assert accuracy.judge(eager[:3], exact, eager, gradient)[2] is not None  # another shape


@pytest.mark.parametrize("op", op_cases.OPS)
def test_eager_and_fused_take_the_same_tensors_and_agree_with_fp64(op: str) -> None:
    case = tiny(op, "forward+backward", batch=op_calls.FP64_CHUNK + 3)  # more than one chunk
    call, given = op_calls.call(case), op_calls.tensors(case, CPU)
    dy = op_calls.upstream(call.eager(**given))
    exact = op_calls.exact(case, given, dy)
    assert {t.dtype for t in exact} == {torch.float64}
    eager = op_suite.results(call.eager, given, call.wanted, dy)
    with fastvit.backend("reference"):
        fused = op_suite.results(call.fused, given, call.wanted, dy)
    for name, got, want, yardstick in zip(("output", *call.wanted), fused, exact, eager, strict=True):
        assert tolerances.compare(got, want, yardstick, gradient=name != "output") is None, name


def test_the_worst_tensor_stands_in_the_row() -> None:
    exact = torch.zeros(3, dtype=torch.float64)
    errors = {"output": (1e-3, 1e-3), "gradient of x": (3e-3, 2e-3), "gradient of residual": (0.0, 0.0)}
    got, eager = ([torch.full((3,), pair[place]) for pair in errors.values()] for place in (0, 1))
    told = op_suite.judge(tuple(errors), got, [exact] * 3, eager)
    assert told["max_error"] == pytest.approx(3e-3)
    assert told["error_ratio"] == pytest.approx(1.5)
    got[1] *= 10
    told = op_suite.judge(tuple(errors), got, [exact] * 3, eager)
    assert (told["status"], told["note"][:13]) == ("FAILED", "gradient of x")


def test_no_weight_is_degenerate() -> None:
    for op in op_cases.OPS:
        one, again, other = (op_calls.tensors(tiny(op), CPU, seed) for seed in (0, 0, 1))
        for name, tensor in one.items():
            assert torch.equal(tensor, again[name]), name
            assert not torch.equal(tensor, other[name]), name
            assert tensor.std() > 0.01, name


@pytest.mark.parametrize("direction", op_cases.DIRECTIONS)
@pytest.mark.parametrize("op", ["attention", "linear_fc2", "patch_embed"])
def test_sets_take_turns_in_every_direction(op: str, direction: str) -> None:
    case = tiny(op, direction)
    call, given = op_calls.call(case), op_calls.tensors(case, CPU)
    sets = [given, op_calls.tensors(case, CPU, seed=5)]
    dy = None if direction == "forward" else op_calls.upstream(call.eager(**given))
    turn = op_suite.prepare(case, call.eager, sets, dy)
    got = [turn() for _ in range(4)]
    got = [result if isinstance(result, tuple) else (result,) for result in got]
    assert all(torch.equal(a, b) for a, b in zip(got[0], got[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got[1], got[3], strict=True))
    assert not torch.equal(got[0][0], got[1][0])
    gradients = len(call.wanted) if direction != "forward" else 0
    assert len(got[0]) == gradients + (direction != "backward")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`fastvit bench-ops` in this process, on tiny shapes: (exit code, stdout, stderr)."""

    def shrunk(gpu: bool, ops=(), models=(), batches=(), dtypes=(), directions=(), tokens=()) -> tuple[list, dict]:
        made = [(op, d) for d in directions or ("forward",) for op in op_cases.expand(ops)]
        return [tiny(op, d, dtype=(dtypes or ["float32"])[0]) for op, d in made], {"patch_embed at 7": "it is odd"}

    monkeypatch.setattr(op_cases, "grid", shrunk)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            "sys.argv", ["fastvit", "bench-ops", "--repeats", "2", "--device", "cpu", *map(str, arguments)]
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return call


def test_ops_leave_a_table_and_rows(run, tmp_path) -> None:
    target = tmp_path / "rows.csv"
    some = "attention,layer_norm,linear_fc1,patch_embed,block"
    code, out, err = run(
        "--op", some, "--direction", "forward,forward+backward", "--backend", "reference", "--csv", target
    )
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:5] == ["case", "shape", "dtype", "direction", "provider"]
    assert {len(line) for line in lines} == {14}
    got = rows.read(target)
    assert len({rows.key(row) for row in got}) == len(got) == len(lines) - 1
    for row in got:
        assert row["status"] == "ok"
        assert row["level"] == rows.OP
        assert float(row["gbs"]) == pytest.approx(float(row["bytes"]) / float(row["median_ms"]) / 1e6, rel=1e-3)
        assert bool(row["gflops"]) == (row["case"] != "layer_norm")
        least = max(float(row["flops"]) / float(row["ceiling_gflops"]), float(row["bytes"]) / float(row["ceiling_gbs"]))
        assert float(row["ceiling_share"]) == pytest.approx(least / float(row["median_ms"]) / 1e6, rel=1e-3)
        assert row["repeats"] == "2"
        assert all(row[column] for column in ("torch", "commit", "date", "p20_ms", "p80_ms", "error_ratio", "peak_mib"))
    assert {row["provider"] for row in got if row["case"] != "attention"} == {"eager", "fastvit-reference"}
    assert {"sdpa-flash", "sdpa-math"} <= {row["provider"] for row in got if row["case"] == "attention"}
    assert "sdpa-cudnn (attention float32) not measured: " in err
    assert "patch_embed at 7 not measured: it is odd" in err


def test_rows_go_to_the_devices_file_and_are_drawn(run, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plot, "draw_all", lambda found, folder: drawn.append((found, folder)) or [])
    arguments = ("--op", "layer_norm", "--backend", "reference", "--results", tmp_path)
    assert run(*arguments)[0] == 0
    (target,) = tmp_path.glob("*.csv")
    got = rows.read(target)
    assert target == rows.path_of(tmp_path, got[0]["device"])
    assert drawn == [(got, tmp_path)]
    assert run(*arguments, "--csv", tmp_path / "rows.csv")[0] == 1


def test_rows_of_ops_leave_the_models_alone(run, tmp_path) -> None:
    target = tmp_path / "rows.csv"
    assert run("--op", "layer_norm", "--backend", "reference", "--csv", target)[0] == 0
    assert rows.of_level(rows.read(target), rows.MODEL) == []
    assert not {path.stem.rsplit("-", 1)[-1] for path in plot.draw_all(rows.read(target), tmp_path)} & {
        "models",
        "memory",
    }
    assert next(iter(table.rich_tables(rows.read(target)))).columns[1].header == "ms"


def test_rows_are_shown_again_from_their_file(run, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rows.csv"
    _, out, _ = run("--op", "layer_norm", "--backend", "reference", "--csv", target)
    assert table.main([str(target)]) == 0
    assert capsys.readouterr().out == out
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert table.main([str(tmp_path / "other.csv")]) == 1
    assert table.main([]) == 2


def test_json_names_what_was_left_out(run) -> None:
    code, out, err = run("--op", "layer_norm", "--dtype", "bf16", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert {row["dtype"] for row in told["rows"]} == {"bfloat16"}
    assert "interpreted" in told["not_measured"]["triton"]


@pytest.mark.parametrize("direction", ["forward", "forward+backward", "backward"])
def test_a_wrong_result_gets_no_speed(run, tmp_path, monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    original = fastvit.ops.layer_norm

    def off(x, weight, bias, eps):
        y = original(x, weight, bias, eps)
        return y + 1e-2 * (x - x.detach() if direction == "forward+backward" else x)

    monkeypatch.setattr(fastvit.ops, "layer_norm", off)
    target = tmp_path / "rows.csv"
    code, _, err = run("--op", "layer_norm", "--direction", direction, "--backend", "reference", "--csv", target)
    assert code == 1
    assert "fastvit-reference FAILED" in err
    assert ("gradient of x" if direction == "forward+backward" else "output") in err
    eager, wrong = rows.read(target)
    assert (eager["status"], wrong["status"], wrong["ratio"], wrong["median_ms"]) == ("ok", "FAILED", "", "")


def test_peers_and_compilers_are_asked_for(run, tmp_path) -> None:
    target = tmp_path / "rows.csv"
    code, _, err = run(
        "--op", "linear_qkv", "--backend", "reference", "--compile", "--peers", "--direction", "forward,backward",
        "--csv", target,
    )  # fmt: skip
    assert code == 0, err
    found = {way: [row["provider"] for row in rows.read(target) if row["direction"] == way] for way in DIRECTIONS}
    assert found["forward"] == ["eager", "fastvit-reference", "compile", "compile-max-autotune", "onednn-packed"]
    assert found["backward"] == ["eager", "fastvit-reference", "compile"]
    for line in (
        "compile-max-autotune (backward) not measured: it takes weights for constants",
        "onednn-packed (backward) not measured: it reads weights packed",
    ):
        assert line in err
    assert "flash-attn" not in err, "it computes no linear layer"


def test_a_ratio_is_the_median_of_rounds(run, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"eager": [1.0, 40.0, 2.0, 6.0, 50.0], "fastvit-reference": [0.5, 10.0, 1.0, 2.0, 50.0]}

    def interleave(providers, clock, repeats, **options: object) -> dict[str, measure.Timing]:
        return {one.name: measure.Timing(rounds[one.name][: repeats or 0]) for one in providers}

    monkeypatch.setattr(measure, "interleave", interleave)
    monkeypatch.setattr(op_suite, "_ceiling", lambda device, dtype: FixedCeiling())
    target = tmp_path / "rows.csv"
    assert run("--op", "layer_norm", "--backend", "reference", "--repeats", 5, "--csv", target)[0] == 0
    eager, ours = rows.read(target)
    assert (float(eager["ratio"]), float(ours["ratio"])) == (1.0, 2.0)  # of 2, 4, 2, 3, 1; of the medians it were 3
    with pytest.raises(ValueError, match="zip"):
        measure.ratio(measure.Timing([1.0, 2.0]), measure.Timing([1.0]))


class FixedCeiling:
    gflops = gbs = 1.0

    def forget(self) -> None: ...

    def sample(self) -> None: ...


def test_as_many_rounds_as_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    fewest, most = op_suite.ROUNDS
    assert fewest >= 15
    now = [0.0]

    def clock(call) -> float:
        now[0] += call()
        return 1e-9  # what a clock says of one call is no measure of what its sample took

    monkeypatch.setattr(op_suite.time, "perf_counter", lambda: now[0])
    for seconds, expected in ((1e-6, most), (op_suite.BUDGET_S / 60, 30), (5.0, fewest)):
        both = [measure.Provider(name, lambda seconds=seconds: seconds) for name in "ab"]
        assert op_suite._warm_up(both, clock) == pytest.approx(expected, abs=1)


def test_who_runs_out_of_memory_hides_nobody(run, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = op_suite.prepare

    def prepare(case, function, sets, dy):
        if function.__name__ == "fused":
            raise torch.OutOfMemoryError("no memory for you")
        return original(case, function, sets, dy)

    monkeypatch.setattr(op_suite, "prepare", prepare)
    target = tmp_path / "rows.csv"
    assert run("--op", "layer_norm", "--backend", "reference", "--csv", target)[0] == 1
    eager, failed = rows.read(target)
    assert eager["status"] == "ok" and eager["median_ms"]
    assert (failed["status"], failed["median_ms"]) == ("FAILED", "")
    assert failed["note"] == "OutOfMemoryError: no memory for you"


def test_a_backend_that_lacks_an_op_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastvit.backends.OPS, "linear", ("cpu",))
    options = op_suite.Options(CPU, ("auto", "cuda"), repeats=1)
    measured = op_suite.run_case(tiny("linear_qkv"), options)
    assert [row["provider"] for row in measured.rows] == ["eager", "fastvit"]
    assert measured.left_out == {"fastvit-cuda": "cuda has no linear kernel"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_of_another_device_are_no_candidates(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastvit.backends, "why_unavailable", lambda name: None)
    reason = suite.why_not_measured({"cpu": "cuda", "cuda": "cpu"}[device], torch.device(device), whole_model=False)
    assert reason == f"its kernels do not run on {device} tensors"
    assert suite.why_not_measured("cuda", torch.device("cuda"), whole_model=False) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--op", "atention"), ("atention", "attention")),
        (("--op", "linear", "--tokens", "0"), ("tokens", "'0'")),
        (("--op", "linear", "--direction", "sideways"), ("sideways", "forward+backward")),
        (("--op", "linear", "--model", "vit_nano"), ("vit_nano",)),
    ],
)
def test_wrong_usage_is_one_line(run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert all(word in err for word in words), err
