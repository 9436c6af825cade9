"""The command line: what it prints, where it writes, and how it fails."""

import errno
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastvit
from fastvit import backends, cli
from fastvit.benchmarks import environment, peers, rows, suite

ROOT = Path(__file__).resolve().parent.parent
TINY = ("bench", "--model", "vit_tiny_patch16_224", "--batch", "1", "--repeats", "1", "--device", "cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return call


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_info_says_what_runs_and_why_the_rest_does_not(run) -> None:
    code, out, _ = run("info", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["versions"]["torch"] == torch.__version__
    assert told["cpu"]["threads"] == torch.get_num_threads()
    assert set(told["backends"]) == set(backends.BACKENDS)
    for name, backend in told["backends"].items():
        assert set(backend["ops"]) == set(backends.OPS)
        assert (backend["why_unavailable"] is None) == fastvit.is_available(name)
        if backend["why_unavailable"]:
            assert all(backend["ops"].values()), "an op cannot run on a backend that is unavailable"
    assert set(told["backends"]["reference"]["ops"].values()) == {None}
    code, out, _ = run("info")
    assert code == 0
    assert all(f"backend {name}\n" in out for name in backends.BACKENDS)
    assert max(map(len, out.splitlines())) > 20


def test_bench_leaves_a_table_rows_pictures_and_a_report(run, tmp_path: Path) -> None:
    code, out, err = run(*TINY, "--backend", "auto,reference", "--results", tmp_path)
    assert code == 0, err
    target = rows.path_of(tmp_path, environment.device_name(torch.device("cpu")))
    lines = [line.split() for line in out.splitlines()]
    assert [line[3] for line in lines] == ["provider", "eager", "fastvit", "fastvit-reference"]
    assert {len(line) for line in lines} == {14}
    got = rows.read(target)
    assert [r["provider"] for r in got] == ["eager", "fastvit", "fastvit-reference"]
    for r in got:
        assert r["status"] == "ok"
        assert r["shape"] == "1x3x224x224"
        assert float(r["images_per_s"]) == pytest.approx(1e3 / float(r["median_ms"]), rel=1e-4)
        assert float(r["gflops"]) == pytest.approx(2.507 / float(r["median_ms"]) * 1e3, rel=1e-3)
        assert 0 < float(r["max_error"]) < 1e-4
        assert r["top1_agreement"] == "1"
        assert all(
            r[column] for column in ("torch", "fastvit", "python", "commit", "date", "threads", "ceiling_gflops")
        )
    assert got[0]["ratio"] == "1"
    assert got[0]["eager"].startswith("timm ")
    with Image.open(target.with_name(f"{target.stem}-models.png")) as image:
        assert image.format == "PNG"
    assert "ViT-Ti/16" in (tmp_path / "report.html").read_text()


def test_bench_speaks_json_and_takes_a_directory(run, tmp_path: Path) -> None:
    Image.new("RGB", (50, 70), "teal").save(tmp_path / "one.png")
    code, out, err = run(*TINY, "--dtype", "bf16", "--backend", "reference", "--images", tmp_path, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [(r["provider"], r["dtype"], r["images"]) for r in told["rows"]] == [
        ("eager", "bfloat16", tmp_path.name),
        ("fastvit-reference", "bfloat16", tmp_path.name),
    ]


def test_wrong_logits_fail_and_get_no_speed(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(model: torch.nn.Module) -> torch.nn.Module:
        model.head.register_forward_hook(lambda module, inputs, output: output + 1e-3 * (torch.arange(1000) == 7))
        return model

    monkeypatch.setattr(fastvit, "accelerate", slightly_wrong)
    target = tmp_path / "rows.csv"
    code, out, err = run(*TINY, "--backend", "reference", "--csv", target)
    assert code == 1
    assert out.splitlines()[2].split()[3:9] == ["fastvit-reference", "-", "-", "-", "-", "FAILED"]
    assert "above the bound" in err
    eager, wrong = rows.read(target)
    assert (eager["status"], wrong["status"], wrong["ratio"], wrong["median_ms"]) == ("ok", "FAILED", "", "")


def test_a_provider_that_raises_does_not_hide_the_others(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError("no kernel\nfor you")

    monkeypatch.setattr(fastvit, "accelerate", refuse)
    code, out, err = run(*TINY, "--backend", "reference")
    assert code == 1
    assert out.splitlines()[1].split()[8] == "1.00x"
    assert "fastvit-reference: RuntimeError: no kernel\n" in err


def test_without_timm_the_reference_stands_in_and_says_so(run, monkeypatch: pytest.MonkeyPatch) -> None:
    suite._baseline.cache_clear()
    monkeypatch.setattr(peers, "import_timm", lambda: (None, "timm is not installed"))
    code, out, err = run(*TINY, "--backend", "auto", "--json")
    suite._baseline.cache_clear()
    assert code == 0, err
    eager = json.loads(out)["rows"][0]
    assert eager["eager"] == "fastvit reference"
    assert "timm is not installed" in eager["note"]


def test_what_is_not_measured_is_named_with_the_reason() -> None:
    chosen, left_out = suite.candidates(torch.device("cpu"), ())
    assert chosen[0] == "auto"
    assert chosen[-1] == "reference"
    assert "triton" not in chosen
    assert "interpreted" in left_out["triton"]
    assert "cuda" in left_out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--model", "vit_tinny_patch16_224"), 1, ("vit_tinny_patch16_224", "vit_tiny_patch16_224")),
        (("--backend", "opencl"), 1, ("opencl", "auto, reference, triton, cuda, cpu")),
        (("--backend", "triton", "--device", "cpu"), 1, ("triton", "interpreted")),
        (("--dtype", "int4"), 1, ("int4", "float32, bfloat16, float16, int8")),
        (("--batch", "1,0"), 1, ("batch", "'0'")),
        (("--batch", "many"), 1, ("batch", "'many'")),
        (("--device", "tpu"), 1, ("tpu", "cpu, cuda")),
        (("--images", "{tmp}/none"), 1, ("none", "no such directory")),
        (("--images", "{tmp}"), 1, ("no images",)),
        (("--csv", "{tmp}/foreign.csv"), 1, ("foreign.csv", "header lacks")),
        (("--csv", "{tmp}/rows.csv", "--results", "{tmp}"), 1, ("--csv", "--results")),
        (("--repeats", "-1"), 2, ("--repeats",)),
        (("--speed", "9"), 2, ("--speed",)),
    ],
)
def test_wrong_requests_fail_in_one_line_before_measuring(
    run, tmp_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    got, out, err = run("bench", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (got, out) == (code, "")
    assert err.startswith("fastvit: ")
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_unreadable_images_are_named_one_per_line(run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"no image")
    code, out, err = run(*TINY[:3], "--batch", "2", "--device", "cpu", "--images", tmp_path)
    assert (code, out) == (1, "")
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["fastvit", "fastvit"]
    assert "a.png: the file is empty" in err
    assert "b.png: not an image" in err


def test_the_module_runs_and_an_unknown_command_is_refused() -> None:
    done = python("-m", "fastvit", "bnch")
    assert done.returncode == 2
    assert "bench" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_names_the_commands_and_loads_none_of_what_they_need() -> None:
    code = "import sys; from fastvit.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    *lines, modules = python("-c", code).stdout.splitlines()
    for command in ("info", "classify", "attention", "convert", "bench", "bench-ops", "profile"):
        assert any(line.split()[:1] == [command] for line in lines), command
    heavy = {"PIL", "matplotlib", "timm", "transformers", "torchvision", "fastvit.images", "fastvit.figures"}
    assert not heavy & set(modules.split())


def test_without_the_extras_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('fastvit', run_name='__main__')"
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (1, "")
    assert 'pip install "fastvit[cli]"' in done.stderr
    assert done.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit, match=r"rich.*fastvit\[cli\]"):
        runpy.run_path(str(cli.__file__))


def test_a_missing_extra_and_a_full_disk_are_one_line_each(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "fastvit.images", raising=False)
    monkeypatch.delattr("fastvit.images", raising=False)
    code, _, err = run("classify", "a.png", "--random-weights", "--model", "vit_tiny_patch16_224")
    assert (code, err.count("\n")) == (1, 1), err
    assert "pillow" in err and "fastvit[cli]" in err
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there.png")
    monkeypatch.setattr(cli, "app", lambda *arguments, **options: (_ for _ in ()).throw(full))
    assert run("info")[::2] == (1, "fastvit: there.png: No space left on device\n")
