"""Runs that are killed, interrupted, out of disk or damaged: what is left is whole, and they go on to the same bits."""

import csv
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import training_runs
from safetensors.torch import load_file
from training_runs import TINY, images, losses, run

import fastvit
from fastvit.training import TrainingError, checkpoints, evaluate, load_run, train
from fastvit.training.log import Log, read_log


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


def names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def evaluations(out: Path) -> list[tuple[float, float, float]]:
    return [(row["step"], row["test_loss"], row["top1"]) for row in read_log(out / "log.csv") if "top1" in row]


def same(one: Path, other: Path) -> None:
    """Two runs have the same losses, norms, evaluations and weights, to the bit."""
    assert losses(one) == losses(other)
    tested = [
        [(r["step"], r["test_loss"], r["top1"]) for r in read_log(o / "log.csv") if "top1" in r] for o in (one, other)
    ]
    assert tested[0] == tested[1]
    a, b = (load_file(o / "model.safetensors") for o in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a | b)


def test_what_a_run_leaves(whole: Path) -> None:
    assert names(whole) == ["step-000028", "step-000030"]
    files = {p.name for p in (whole / "checkpoints" / "step-000030").iterdir()}
    assert files == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert {p.name for p in whole.iterdir()} == {"config.json", "log.csv", "checkpoints", "model.safetensors"}
    rows = read_log(whole / "log.csv")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["step"] for row in rows if "top1" in row] == [10, 20, 30]
    model = fastvit.VisionTransformer(TINY, num_classes=3)
    fastvit.load_checkpoint(model, whole / "model.safetensors")
    again = evaluate(model, images(24, seed=1))
    assert (again.images, again.top1) == (24, rows[-1]["top1"])
    assert again.loss == pytest.approx(rows[-1]["test_loss"], rel=1e-6)
    averaged = load_file(whole / "checkpoints" / "step-000030" / "ema.safetensors")
    assert all(torch.equal(averaged[name], p) for name, p in model.state_dict().items())
    raw = load_file(whole / "checkpoints" / "step-000030" / "model.safetensors")
    assert not torch.equal(raw["head.weight"], averaged["head.weight"])


def test_a_run_killed_at_a_random_step_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    out, step = tmp_path / "killed", random.randint(8, 24)
    command = [sys.executable, str(training_runs.__file__), str(out), str(torch.get_num_threads())]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE)
    try:
        while process.poll() is None and not (out / "log.csv").exists():
            time.sleep(0.01)
        while process.poll() is None and (out / "log.csv").read_text().count("\n") <= step:
            time.sleep(0.001)
    finally:
        process.kill()
        _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err.decode()
    assert not (out / "model.safetensors").exists()
    trained = run(out)
    assert trained.first in (7, 14, 21, 28), f"killed at step {step}"
    same(whole, out)
    seconds = [row["seconds"] for row in read_log(out / "log.csv")]
    assert seconds == sorted(seconds), "the clock began again"


def test_interrupted_in_the_middle_of_a_step(whole: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, step in ((signal.SIGINT, 12), (signal.SIGTERM, 16)):

        def interrupt(progress, number=number, step=step) -> None:
            if progress.row["step"] == step:
                os.kill(os.getpid(), number)

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, show=interrupt)
        assert names(tmp_path)[-1] == f"step-{step:06d}"
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert run(tmp_path).first == 16
    same(whole, tmp_path)


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = (whole / "log.csv").read_bytes()
    trained = run(whole)
    assert (trained.first, trained.steps) == (30, 30)
    assert trained.evaluation is not None
    assert trained.evaluation.top1 == read_log(whole / "log.csv")[-1]["top1"]
    assert (whole / "log.csv").read_bytes() == before


def test_a_run_in_another_thread_and_with_workers(whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    same(whole, tmp_path)


@pytest.mark.parametrize("limited", [False, True], ids=["no space left", "files are limited"])
def test_a_full_disk_leaves_the_checkpoint_before(whole: Path, tmp_path: Path, monkeypatch, limited: bool) -> None:
    size = max(p.stat().st_size for p in (whole / "checkpoints" / "step-000030").iterdir())
    library = checkpoints.safetensors_torch()
    save_file, limits = library.save_file, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(tensors, path, *rest) -> None:
        if "step-000014" in str(path) and "optimizer" in str(path):
            if limited:  # the system's own refusal, in the middle of the file
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
            else:
                Path(path).write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_file(tensors, path, *rest)

    monkeypatch.setattr(library, "save_file", full)
    reason = "File too large|os error 27" if limited else "No space left on device"
    try:
        with pytest.raises(
            TrainingError, match=f"step-000014 cannot be written: .*({reason}).*step-000007 is the newest"
        ):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000007"]
    assert run(tmp_path).first == 7
    same(whole, tmp_path)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115  (closed by close)
    log._csv = csv.writer(log._file)
    with pytest.raises(TrainingError, match=r"log\.csv cannot be written: No space left on device"):
        log.write([{"step": 1, "loss": 2.0}])
    log.close()


def copied(whole: Path, out: Path) -> Path:
    """A run that was stopped after its last checkpoint, before its end."""
    shutil.copytree(whole, out)
    (out / "model.safetensors").unlink()
    return out


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "one bit", "missing"])
def test_a_damaged_checkpoint_is_seen(whole: Path, tmp_path: Path, name: str, how: str) -> None:
    out = copied(whole, tmp_path / "run")
    place = out / "checkpoints" / "step-000030" / name
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 2
    place.unlink()
    if how != "missing":
        place.write_bytes(data[: len(data) // 2] if how == "truncated" else data)
    if (name, how) == ("state.json", "one bit"):
        return  # a digit of a digest, or of a second: either is seen or does not matter
    with pytest.warns(UserWarning, match=r"step-000030 is damaged .*going on from step-000028"):
        found = checkpoints.newest(out)
    assert found is not None
    assert found.step == 28


def test_damaged_checkpoints_are_gone_back_behind_or_told(whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "run")
    (out / "checkpoints" / "step-000030" / "ema.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="going on from step-000028"):
        assert run(out).first == 28
    same(whole, out)
    for folder in (out / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    with pytest.raises(
        TrainingError, match=r"no checkpoint is whole: .*step-000030 is damaged.*step-000028 is damaged"
    ):
        run(out)
    assert len(losses(out)) == 30


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 1e-3}, "recipe: lr was 0.003, is 0.001"),
        ({"steps": 31}, "recipe: steps was 30, is 31"),
        ({"seed": 5}, "recipe: seed was 0, is 5"),
        ({"model_options": {"depth": 3}}, "model: depth was 2, is 3"),
        ({"resume": "never"}, "has a run of 30 steps"),
    ],
)
def test_another_run_is_refused(whole: Path, changed: dict, message: str) -> None:
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(TrainingError, match=message):
        run(whole, **changed)
    with pytest.raises(TrainingError, match="data: classes were others; data: images was 80, is 40"):
        train(images(40, classes=4), whole, model=TINY, **{**training_runs.HARD, "model_options": {"num_classes": 3}})
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_what_may_change_while_a_run_goes_on(whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "run")
    assert run(out, eval_every=3, checkpoint_every=9, keep=1, accumulate=2, resume="must").first == 30


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no checkpoint to resume"):
        run(tmp_path / "new", resume="must")
    assert not (tmp_path / "new").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(TrainingError, match=r"has a config\.json that no run wrote"):
        run(tmp_path / "theirs")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file; a run needs a directory"):
        run(tmp_path / "file")
    with pytest.raises(TrainingError, match=r"is no run's directory"):
        load_run(tmp_path / "theirs")


def test_fine_tuning_begins_with_the_files_weights_and_a_head_of_zeros(whole: Path, tmp_path: Path) -> None:
    began = {}

    def first(progress) -> None:
        began.setdefault("row", progress.row)

    options = {"recipe": "finetune", "steps": 2, "warmup_steps": 1, "batch_size": 8, "lr": 1e-12, "device": "cpu"}
    options |= {"model": TINY, "checkpoint": whole / "model.safetensors"}
    tuned = train(images(40, classes=5), tmp_path, img_size=48, show=first, **options)
    assert began["row"]["loss"] == pytest.approx(torch.tensor(5.0).log().item(), rel=1e-6)
    before, after = load_file(whole / "model.safetensors"), tuned.model.state_dict()
    assert after["pos_embed"].shape == (1, 37, 16)
    torch.testing.assert_close(after["pos_embed"][:, 0], before["pos_embed"][:, 0])
    torch.testing.assert_close(after["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])
    assert after["head.weight"].shape == (5, 16)
    assert after["head.weight"].abs().max() < 1e-9
    same_classes = train(images(), tmp_path / "b", **options)
    assert same_classes.model.head.weight.abs().max() < 1e-9


def test_the_model_of_a_run(whole: Path) -> None:
    last, newest = load_run(whole), load_run(whole / "checkpoints" / "step-000030")
    assert not last.training
    assert all(torch.equal(p, q) for p, q in zip(last.parameters(), newest.parameters(), strict=True))
    older = load_run(whole / "checkpoints" / "step-000028")
    assert not torch.equal(older.head.weight, last.head.weight)


def test_tensorboard_has_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run(tmp_path, steps=6, tensorboard=True)
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    assert written == [(step, pytest.approx(loss, rel=1e-6)) for step, loss, _ in losses(tmp_path)]


def test_without_tensorboard(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="TensorBoard is not installed"):
        run(tmp_path, tensorboard=True)
