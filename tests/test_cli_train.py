"""`fastvit train` and `fastvit evaluate`: on CIFAR's own files, in several processes, and what they refuse."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import random_set, write_cifar10, write_cifar100
from safetensors.torch import load_file

import fastvit
from fastvit import cli
from fastvit.training.log import read_log

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--model", "vit_nano_patch8_32", "--device", "cpu")
SHORT = (*SMALL, "--recipe", "pretrain", "--steps", "3", "--batch-size", "4", "--warmup-steps", "1", "--lr", "1e-3")


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Both CIFARs in both formats: python/cifar-10-batches-py, binary/cifar-10-batches-bin and so on."""
    root = tmp_path_factory.mktemp("sets")
    for binary in (False, True):
        for write, classes in ((write_cifar10, 10), (write_cifar100, 100)):
            folder = root / ("binary" if binary else "python")
            write(folder, random_set(40, classes), random_set(8, classes, seed=1), binary=binary)
    return root


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_trains_and_evaluates_alike_in_both_formats(call, sets: Path, tmp_path: Path, kind: str) -> None:
    told, weights = [], []
    for form in ("python", "binary"):
        out, place = tmp_path / form, f"{kind}:{sets / form}"
        code, text, err = call("train", place, "-o", out, *SHORT, "--shift", 4, "--mixup", 0.2, "--json")
        assert code == 0, err
        found = json.loads(text)
        assert (found["steps"], found["resumed_after"], found["test"]["images"]) == (3, 0, 8)
        weights.append(load_file(found["weights"]))
        assert weights[-1]["head.weight"].shape == (int(kind[5:]), 64)
        code, text, err = call("evaluate", out, place, "--batch-size", 3, "--json")
        assert code == 0, err
        again = json.loads(text)
        assert again["top1"] == found["test"]["top1"]
        assert again["loss"] == pytest.approx(found["test"]["loss"], rel=1e-6)
        told.append((found["loss"], found["test"]))
    assert told[0] == told[1]
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())


def test_the_same_command_goes_on(call, sets: Path, tmp_path: Path) -> None:
    command = ("train", sets / "binary" / "cifar-10-batches-bin", "-o", tmp_path / "run", *SHORT)
    code, out, _ = call(*command)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "steps", "loss", "seconds", "images/s", "test", "top-1", "top-5", "weights"
    ]  # fmt: skip
    code, out, _ = call(*command, "--resume", "must", "--json")
    assert code == 0
    assert json.loads(out)["resumed_after"] == 3
    state = tmp_path / "run" / "checkpoints" / "step-000003" / "state.json"
    state.write_text("")
    code, out, err = call(*command)
    assert (code, out) == (1, "")
    assert err.startswith("fastvit: no checkpoint is whole: ")
    assert err.count("\n") == 1


def test_probes(call, sets: Path, tmp_path: Path) -> None:
    place = f"cifar10:{sets / 'python'}"
    model = fastvit.create_model("vit_nano_patch8_32")
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for option in (("--linear-probe",), ("--few-shot", "2"), ("--few-shot", "2", "--l2", "3", "--seed", "4"), ()):
        code, out, err = call("evaluate", tmp_path / "weights.safetensors", place, *option, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["images"] == 8
        assert 0 <= found["top1"] <= found["top5"] <= 1
    code, out, _ = call("evaluate", tmp_path / "weights.safetensors", place)
    assert [line.split()[0] for line in out.splitlines()] == ["weights", "kind", "images", "loss", "top-1", "top-5"]


def test_figures(call, tmp_path: Path) -> None:
    code, out, err = call("train", "digits", "-o", tmp_path, *SHORT, "--crop-scale", 0, "--figures", "--json")
    assert code == 0, err
    assert json.loads(out)["figures"] == [str(tmp_path / "curve.png"), str(tmp_path / "rollout.png")]
    for name in ("curve.png", "rollout.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "vit_nano"), "unknown model 'vit_nano': did you mean"),
        (("--recipe", "finetuning"), "unknown recipe 'finetuning': expected pretrain, finetune"),
        (("--lr", "-1"), "lr must be a number > 0, got -1.0"),
        (("--betas", "0.9"), "--betas must be two numbers separated by a comma, got '0.9'"),
        (("--optimizer", "adam"), "optimizer must be one of sgd, adamw, got 'adam'"),
        (("--backend", "fast"), "unknown backend 'fast'"),
        (("--resume", "yes"), "unknown resume 'yes': expected auto, never, must"),
        (("--resume", "must"), "has no checkpoint to resume"),
        (("--parallel", "ddp"), "parallel 'ddp' needs several processes: start it by torchrun"),
        (("--parallel", "pp"), "parallel must be one of auto, none, ddp, fsdp, tp, got 'pp'"),
        (("--checkpoint", "nowhere.safetensors"), "nowhere.safetensors: no such checkpoint"),
        (("--batch-size", "64"), "64"),
        (("--device", "tpu"), "unknown device 'tpu': expected cpu, cuda"),
    ],
)
def test_train_refuses_in_one_line(call, sets: Path, tmp_path: Path, arguments: tuple, message: str) -> None:
    code, out, err = call("train", f"cifar10:{sets / 'python'}", "-o", tmp_path / "run", *SHORT, *arguments)
    assert (code, out) == (1, ""), err
    assert message in err
    assert err.startswith("fastvit: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_read(call, sets: Path, tmp_path: Path) -> None:
    code, out, err = call("train", "cifar10:nowhere", "-o", tmp_path / "run", *SHORT)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "nowhere: no cifar10 here" in err
    folder = write_cifar10(tmp_path, random_set(20, 10), random_set(4, 10), binary=True)
    cut = folder / "data_batch_3.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    code, out, err = call("train", tmp_path, "-o", tmp_path / "run", *SHORT)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "data_batch_3.bin" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "digits"), "nowhere: no such checkpoint"),
        (("{}", "digits", "--linear-probe", "--few-shot", "3"), "exclude each other"),
        (("{}", "digits", "--l2", "3"), "--l2 is for"),
        (("{}", "digits"), "config.json: No such file"),
    ],
)
def test_evaluate_refuses_in_one_line(call, tmp_path: Path, arguments: tuple, message: str) -> None:
    code, out, err = call("evaluate", *(argument.format(tmp_path) for argument in arguments))
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert message in err


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(call, sets: Path, tmp_path: Path) -> None:
    place = f"cifar10:{sets / 'python'}"
    options = (*SHORT, "--dropout", "0", "--crop-scale", "0", "--ema", "0.9", "--checkpoint-every", "2", "--shift", "2")
    code, out, err = call("train", place, "-o", tmp_path / "one", *options, "--json")
    assert code == 0, err
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", str(free_port())]
    command = [*launcher, "-m", "fastvit", "train", place, "-o", str(tmp_path / "two"), *options, "--parallel", "ddp"]
    done = subprocess.run(
        [*command, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    alone, together = json.loads(out), json.loads(done.stdout)  # one object: the main process alone prints
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["test"] == pytest.approx(alone["test"], rel=1e-4)
    rows = [read_log(tmp_path / name / "log.csv") for name in ("one", "two")]
    for key, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], rel=bound)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in a:
        np.testing.assert_allclose(b[name], a[name], rtol=1e-3, atol=1e-5)
    # what two processes wrote, one goes on with and evaluates
    code, out, err = call("evaluate", tmp_path / "two" / "checkpoints" / "step-000003", place, "--json")
    assert code == 0, err
    assert json.loads(out)["top1"] == together["test"]["top1"]
    code, out, err = call("train", place, "-o", tmp_path / "two", *options, "--json")
    assert code == 0, err
    assert json.loads(out)["resumed_after"] == 3
