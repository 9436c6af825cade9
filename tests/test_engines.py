"""Whole-model cases beyond the forward pass: other projects' engines, int8, image sizes, training steps."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from test_benchmarks import row
from test_cli import TINY, run  # noqa: F401  (a fixture)
from torch.nn import functional

import fastvit
from fastvit.benchmarks import accuracy, cases, compilers, engines, libraries, measure, peers, suite, table, training

VIT = "vit_tiny_patch16_224"


def test_absent_peers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = engines.left_out(engines.ENGINES, ["float32", "bfloat16", "int8"])
    for name in ("openvino-latency", "openvino-throughput"):
        assert "openvino is not installed" in found[f"{name} (float32)"]
        assert "openvino, nncf" in found[f"{name} (int8)"]
        assert 'pip install "fastvit[peers]"' in found[f"{name} (float32)"]
    assert "bfloat16" in found["onnxruntime (bfloat16)"]
    assert "onnxscript" in found["onnxruntime (int8)"]
    assert "int8" not in found
    assert "compile-freezing (float32)" not in found
    assert "compile-freezing (int8)" in found
    peers_alone = {"onnxruntime", "openvino-latency", "openvino-throughput", "zentorch"}
    libraries = {"transformers", "fastvit-transformers"}
    assert set(engines.left_out(engines.ENGINES, ["float32"])) == {*peers_alone, *libraries, "tensorrt"}
    assert "runs on cuda alone" in found["tensorrt"]
    on_gpu = engines.left_out(engines.ENGINES, ["float32"], "cuda")
    assert "pip install torch-tensorrt" in on_gpu["tensorrt"]
    assert "runs on cpu alone" in on_gpu["openvino-latency"]


def test_a_peer_that_cannot_be_imported_is_named_with_the_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "brokenpeer.py").write_text("raise OSError('undefined symbol')\n")
    (tmp_path / "brokenpeer-1.5.dist-info").mkdir()
    (tmp_path / "brokenpeer-1.5.dist-info" / "METADATA").write_text("Name: brokenpeer\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = engines.Engine(("broken",), pytest.fail, ("brokenpeer",)).why_not("float32")
    assert "OSError: undefined symbol" in str(reason)
    assert f"brokenpeer 1.5, torch {torch.__version__}" in str(reason)


def fake(name: str, change: float = 0.0, **options: object) -> engines.Engine:
    """A peer that is eager, its logits off by a bit."""

    def build(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
        return [measure.Provider(name, lambda: model(batch) + change, **options)]  # type: ignore[arg-type]

    return engines.Engine((name,), build)


def broken(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    raise RuntimeError("no such graph\nat all")


def breaks_later(model: torch.nn.Module, batch: torch.Tensor, dtype: str) -> list[measure.Provider]:
    return [measure.Provider("late", lambda: broken(model, batch, dtype)[0].run())]


def test_peers_are_judged_but_fail_nothing(run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    others = (fake("right"), fake("wrong", 1e-2), fake("pair", batches=2, note="two at once"))
    others += (engines.Engine(("early",), broken), engines.Engine(("late",), breaks_later))
    absent = engines.Engine(("absent",), broken, ("no_such_module",))
    monkeypatch.setattr(engines, "ENGINES", (*others, absent))
    code, out, err = run(*TINY, "--backend", "auto", "--peers", "--json")
    assert code == 0, err
    assert err.startswith("multiply-adds on registers, float32: ")
    told = json.loads(out)
    found = {r["provider"]: r for r in told["rows"]}
    assert list(found) == ["eager", "fastvit", "right", "wrong", "pair"]
    assert {r["status"] for r in found.values()} == {"ok"}
    assert found["right"]["note"] == ""
    assert "above the bound" in found["wrong"]["note"]
    assert found["wrong"]["median_ms"] > 0
    assert found["wrong"]["relative_error"] > 1e-3 > found["right"]["relative_error"] > 0
    assert found["pair"]["note"] == "two at once"
    where = f"{VIT} batch 1 float32"
    assert told["not_measured"][f"early ({where})"] == "RuntimeError: no such graph"
    assert told["not_measured"][f"late ({where})"] == "RuntimeError: no such graph"
    assert "no_such_module is not installed" in told["not_measured"]["absent"]


def test_a_run_of_several_batches_counts_for_one() -> None:
    providers = [measure.Provider("one", torch.rand), measure.Provider("three", torch.rand, batches=3)]
    timings = measure.interleave(providers, lambda call: 6.0, repeats=2)
    assert {name: timing.samples for name, timing in timings.items()} == {"one": [6.0, 6.0], "three": [2.0, 2.0]}


def test_the_settled_clock_rests_and_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(measure.time, "sleep", done.append)

    def clock(call) -> float:
        done.append("clock")
        call()
        return 7.0

    assert measure.settled(clock)(lambda: done.append("call")) == 7.0
    assert done == [measure.REST_S, "call", "clock", "call"]


def test_a_long_call_is_warmed_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    calls: list[str] = []

    def call() -> None:
        calls.append("call")

    def clock(one) -> float:
        one()
        return 2 * measure.LONG_S

    settled = measure.settled(clock)
    for _ in range(3):
        settled(call)
    assert len(calls) == 4


def test_the_global_setting_freezes_the_weights() -> None:
    model = torch.nn.Linear(64, 64, bias=False).eval()
    batch = torch.randn(3, 64)
    torch.compiler.reset()
    with torch.inference_mode():
        plain = torch.compile(model)
        plain(batch)
    (provider,) = compilers.freezing(model, batch, "float32")
    with torch.inference_mode():
        before = provider.run()
        model.weight.data.zero_()
        assert torch.equal(plain(batch), torch.zeros(3, 64))
        assert torch.equal(provider.run(), before), "the weights were read again: they are no constants"
    torch.compiler.reset()


def test_engines_that_take_a_minute_are_asked_for_by_name() -> None:
    ready, slow = engines.chosen((), "cpu")
    assert set(slow) == {"compile-max-autotune"} and "--peer" in slow["compile-max-autotune"]
    assert "compile-max-autotune" in [name for engine in engines.chosen((), "cuda")[0] for name in engine.names]
    assert {name for engine in ready for name in engine.names}.isdisjoint(slow)
    asked, left = engines.chosen(["compile-max-autotune", "openvino-latency"], "cpu")
    assert [engine.names[0] for engine in asked] == ["openvino-latency", "compile-max-autotune"]
    assert left == {}


@pytest.mark.parametrize("library", ["transformers", "torchvision"])
def test_other_libraries_models_have_the_same_weights(library: str) -> None:
    model = peers.baseline(VIT, seed=3).model
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        logits = model.double()(images.double())
        plain, fused = libraries.build(library, model.float(), images, "float32")
        assert (plain.name, fused.name) == (library, f"fastvit-{library}")
        for provider in (plain, fused):
            with provider.scope():
                torch.testing.assert_close(provider.run().double(), logits, rtol=1e-4, atol=1e-5)


def test_a_library_s_accelerated_model_is_ours_and_must_be_right(run, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(engines, "ENGINES", (fake("fastvit-other", 1e-2),))
    code, out, _ = run(*TINY, "--backend", "reference", "--peers", "--json")
    wrong = json.loads(out)["rows"][-1]
    assert (code, wrong["provider"], wrong["status"], wrong.get("ratio")) == (1, "fastvit-other", "FAILED", None)


def test_int8_stands_beside_eager_in_float32(run) -> None:  # noqa: F811
    code, out, err = run(*TINY, "--dtype", "int8", "--json")
    assert code == 0, err
    told = json.loads(out)
    eager, *ours = told["rows"]
    assert [r["provider"] for r in ours] == ["fastvit", "fastvit-cpu"]
    assert "eager is float32" in eager["note"]
    assert eager["relative_error"] < 1e-5
    for r in ours:
        assert "linear layers in int8" in r["note"] and not r["note"].startswith("0 of")
        assert 1e-3 < r["relative_error"] < accuracy.INT8_RELATIVE
        assert r["error_ratio"] is None
        assert r["ceiling_gflops"] > 0


@pytest.mark.parametrize(("error", "red"), [(4e-2, False), (6e-2, True), (float("nan"), True)])
def test_int8s_own_bound(error: float, red: bool) -> None:
    exact = torch.randn(4, 100, dtype=torch.float64)
    got = accuracy.compare(exact * (1 + error), exact)
    assert red or got.relative == pytest.approx(error)
    assert (accuracy.why_red(torch.int8, got, accuracy.compare(exact, exact), 1.0) is not None) == red


def test_the_size_of_the_images_grows_the_work(run) -> None:  # noqa: F811
    code, out, err = run(*TINY, "--img-size", "32,64", "--backend", "auto")
    assert code == 0, err
    models = [line.split()[0] for line in out.splitlines()[1:]]
    assert models == [f"{VIT}/32px"] * 2 + [f"{VIT}/64px"] * 2
    small, large = (cases.Case(VIT, 2, "float32", img_size=side) for side in (32, 64))
    assert (small.shape, large.shape) == ("2x3x32x32", "2x3x64x64")
    assert cases.tokens(large.config) == 17
    assert small.flops < large.flops < cases.Case(VIT, 2, "float32").flops


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--img-size", "100"), ("100", "divisible", VIT, "16 x 16")),
        (("--img-size", "0"), ("img-size", "'0'")),
        (("--direction", "sideways"), ("direction", "forward, training")),
        (("--direction", "training", "--dtype", "int8"), ("training", "float32, bfloat16", "int8")),
        (("--peer", "onnx"), ("peer", "onnx", "onnxruntime")),
        (("--grid", "huge"), ("grid", "huge", "default, peers")),
        (("--direction", "training", "--peers"), ("--peers", "forward")),
        (("--dtype", "int8", "--backend", "reference"), ("int8", "reference")),
    ],
)
def test_wrong_cases_fail_in_one_line(run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:  # noqa: F811
    code, out, err = run(*TINY, *arguments)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_training_step_is_checked_and_timed(run) -> None:  # noqa: F811
    code, out, err = run(*TINY, "--direction", "training", "--img-size", "32", "--dtype", "fp32,bf16", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert {(r["direction"], r["status"]) for r in rows} == {("training", "ok")}
    assert {r["provider"] for r in rows} >= {"eager", "fastvit", "fastvit-reference"}
    assert all(r["flops"] == 3 * cases.Case(VIT, 1, "float32", img_size=32).flops for r in rows)
    assert all((1e-3 if r["dtype"] == "bfloat16" else 1e-8) < r["relative_error"] for r in rows)


def test_a_wrong_gradient_gets_no_speed(run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def slightly_wrong(model: torch.nn.Module) -> torch.nn.Module:
        model.blocks[0].register_full_backward_hook(lambda module, given, _: (given[0] * 1.001,))
        return model

    monkeypatch.setattr(fastvit, "accelerate", slightly_wrong)
    code, out, _ = run(*TINY, "--direction", "training", "--img-size", "32", "--backend", "reference", "--json")
    wrong = json.loads(out)["rows"][1]
    assert (code, wrong["status"], wrong.get("median_ms")) == (1, "FAILED", None)
    assert "above the bound" in wrong["note"]


def test_a_step_leaves_the_gradients_of_its_own_batch() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).train()
    images, classes = torch.randn(3, 3, 2, 2), training.labels(3, 5, 0, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = training.Step(model, images, classes, optimizer=training.optimizer(model))
    first, again = step(), step()
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    expected = torch.autograd.grad(functional.cross_entropy(model(images), classes), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    two = torch.autograd.grad(functional.cross_entropy(model(images[:2]), classes[:2]), list(model.parameters()))
    torch.testing.assert_close(step.gradient(), torch.cat([g.flatten() for g in two]))
    exact = training.exact_gradient(model, images, classes)
    torch.testing.assert_close(exact.float(), step.gradient())


def test_titles_say_what_is_unusual() -> None:
    usual = row(case=VIT, shape="1x3x224x224")
    rows = [usual, {**usual, "shape": "1x3x384x384"}, {**usual, "direction": "training"}]
    titles = [title for title, _ in table.cases_of(rows)]
    assert titles == [f"{VIT}  batch 1  float32{more}" for more in ("", "  384 px", "  training")]


def test_only_what_computes_in_int8_is_asked_to() -> None:
    with pytest.raises(suite.UnavailableError, match="int8 needs the cpu backend"):
        suite.candidates(torch.device("cuda"), (), int8=True)
