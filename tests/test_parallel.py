"""DDP, FSDP2, tensor parallelism and distributed checkpoints over real processes (gloo), beside one process alone."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randomize, timm
from parallel_processes import (
    BATCH,
    MODES,
    OPTIONS,
    READ,
    SAVED_AFTER,
    STEPS,
    averages_of,
    batch,
    make,
    optimizer_of,
    read,
    steps,
)
from tolerances import assert_close
from torch import Tensor, nn

import fastvit
from fastvit.training.error import TrainingError
from fastvit.training.parallel import Parallel

ROOT = Path(__file__).resolve().parent.parent
ALONE = Parallel.start("none", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights to begin with, and the checkpoint that one process writes."""
    place = tmp_path_factory.mktemp("parallel")
    for kind, options in OPTIONS.items():
        torch.save(randomize(fastvit.VisionTransformer(**options)).state_dict(), place / f"{kind}.pt")
    return place


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    """What one process sees."""
    with fastvit.backend("cpu"):
        model = ALONE.wrap(make(folder))
        optimizer = optimizer_of(ALONE, model)
        seen = steps(ALONE, model, optimizer, range(SAVED_AFTER))
        state = ALONE.full_state(model)
        ALONE.save(folder / "none", model, optimizer, averages_of(model))
        seen += steps(ALONE, model, optimizer, range(SAVED_AFTER, STEPS))
        with torch.no_grad():
            logits = model.eval()(batch(99)[0])
            for p in model.parameters():
                p.mul_(0.5)
            halved = model(batch(99)[0])
    return {"steps": torch.tensor(seen), "saved": state, "logits": logits, "halved": halved}


@pytest.fixture(scope="module")
def launched(folder, alone) -> dict[int, list[dict[str, Any]]]:
    """What each process of two, and of four, saw."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FASTVIT_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "parallel_processes.py"), str(folder)]
    run = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-6000:]
    assert "Warning" not in run.stderr, run.stderr
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
        for world in (2, 4)
    }


@pytest.fixture
def two(launched) -> list[dict[str, Any]]:
    return launched[2]


@pytest.fixture
def four(launched) -> list[dict[str, Any]]:
    return launched[4]


@cache
def slopes_alone(weights: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the first batch by timm, which has no relative positions: by our own model in one process."""
    library = fastvit if weights.stem == "relative" else timm.models.vision_transformer
    model: nn.Module = library.VisionTransformer(**OPTIONS[weights.stem])
    model.load_state_dict(torch.load(weights, weights_only=True))
    images, targets = batch(0)
    F.cross_entropy(model.to(dtype)(images.to(dtype)), targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_each_process_knows_its_place(two, four):
    assert [seen["place"] for seen in two] == [["ddp", 0, 2, True], ["ddp", 1, 2, False]]
    assert [seen["place"][1] for seen in four] == [0, 1, 2, 3]
    assert [two[1][mode]["data"] for mode in MODES] == [[1, 2], [1, 2], [0, 1]]


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_norms_are_those_of_one_process(mode, alone, two):
    got = torch.tensor(two[0][mode]["steps"])
    assert torch.equal(got, torch.tensor(two[1][mode]["steps"]))
    assert len(got) == STEPS
    difference = (got - alone["steps"]).abs().amax(0)
    print(f"{mode}: largest difference of a loss {difference[0]:.1e}, of a norm {difference[1]:.1e}")
    assert difference[0] < 1e-5
    assert difference[1] < 1e-5 * alone["steps"][:, 1].max()
    assert alone["steps"][:, 1].max() > 2.0  # it was clipped


@pytest.mark.parametrize("way", ["once", "accumulated", "recomputed", "normed", "relative"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_timms(mode, way, folder, two):
    weights = folder / f"{way if way in OPTIONS else 'plain'}.pt"
    exact, eager = (slopes_alone(weights, dtype) for dtype in (torch.float64, torch.float32))
    got = two[0][mode]["slopes"][way]
    assert got.keys() == exact.keys()
    for name, slope in got.items():
        assert_close(f"{mode} {way} {name}", slope, exact[name], eager[name], gradient=True)
    assert two[1][mode]["slopes"][way] == {}  # whole tensors are for the main process


def test_ddp_exchanges_gradients_at_the_last_micro_batch_only(two):
    first, second = (seen["ddp"]["slopes"]["unexchanged"] for seen in two)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_sees_the_weights_of_now(mode, alone, two):
    for seen in two:
        for what in ("logits", "halved"):
            torch.testing.assert_close(seen[mode][what], alone[what], atol=1e-4, rtol=0)
    assert (alone["logits"] - alone["halved"]).abs().max() > 0.1


def test_fused_ops_run(two):
    blocks = ["encoder cpu", "layer_norm cpu", "patch_embed cpu"]
    assert two[1]["ddp"]["ops"] == two[1]["fsdp"]["ops"] == blocks
    assert two[1]["tp"]["ops"] == ["attention cpu", "layer_norm cpu", "linear cpu", "patch_embed cpu"]


def test_a_block_is_run_by_the_encoder_unless_it_has_a_forward_of_its_own(folder):
    class Same(fastvit.layers.Block):
        pass

    class Squared(fastvit.layers.Block):
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return super().forward(x, *args).square()

    logits = {}
    for kind in (fastvit.layers.Block, Same, Squared):
        model = make(folder).eval()
        model.blocks[1].__class__ = kind
        with torch.no_grad(), fastvit.backend("cpu"):
            logits[kind] = model.forward_features(batch(0)[0]), model.blocks[1](torch.ones(1, 7, 32))
    plain, same, squared = logits.values()
    assert torch.equal(same[0], plain[0])
    assert torch.equal(squared[1], plain[1].square())
    assert not torch.allclose(squared[0], plain[0], atol=1e-3)


def test_dropout_leaves_whole_parameters_alike(two):
    first, second = (seen["dropout"] for seen in two)
    assert {"pos_embed", "blocks.0.norm1.weight", "blocks.1.ls2.gamma", "head.weight"} <= first.keys()
    for name, slope in first.items():
        assert torch.equal(slope, second[name]), name
    assert not torch.allclose(first["head.bias"], two[0]["tp"]["slopes"]["once"]["head.bias"], atol=1e-3)


def check_read(got: dict[str, Any], saved: dict[str, Tensor], alone: dict[str, Any]) -> None:
    assert got["state"].keys() == got["averaged"].keys() == saved.keys() == alone["saved"].keys()
    for name, tensor in saved.items():
        assert torch.equal(got["state"][name], tensor), name
        assert torch.equal(got["averaged"][name], 2 * tensor), name
    following = alone["steps"][SAVED_AFTER : SAVED_AFTER + 3]
    torch.testing.assert_close(torch.tensor(got["steps"]), following, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("writer", MODES)
def test_one_process_reads_what_two_wrote(writer, folder, alone, two):
    with fastvit.backend("cpu"):
        check_read(read(ALONE, folder, writer), two[0][writer]["saved"], alone)


@pytest.mark.parametrize(("writer", "mode"), READ)
def test_four_processes_read_what_two_or_one_wrote(writer, mode, alone, two, four):
    got = [seen[f"{writer} {mode}"] for seen in four]
    check_read(got[0], alone["saved"] if writer == "none" else two[0][writer]["saved"], alone)
    assert got[3]["steps"] == got[0]["steps"]


def test_one_process_that_fails_is_heard_by_all(folder, two):
    for seen in two:
        told = seen["failures"]
        assert told["full"].startswith("TrainingError: fastvit: cannot write")
        assert "No space left on device" in told["full"] and "\n" not in told["full"]
        assert told["unread"].startswith("TrainingError: fastvit: cannot read") and "(process 1)" in told["unread"]
        assert told["odd"] == "ValueError: fastvit: parallel 'tp': 1 heads cannot be shared evenly by 2 processes"
        assert told["none"].startswith("ValueError: fastvit: parallel 'none', but torchrun")


def test_a_checkpoint_that_does_not_fit_changes_nothing(folder, alone, tmp_path):
    other = fastvit.VisionTransformer(**{**OPTIONS["plain"], "num_classes": 7})
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(TrainingError, match=r"model/head.weight is \[5, 32\], expected \[7, 32\]$"):
        ALONE.load(folder / "none", other)
    with pytest.raises(TrainingError, match=r"it has no model/blocks\.2\.norm1\.weight and 13 more$"):
        ALONE.load(folder / "none", fastvit.VisionTransformer(**{**OPTIONS["plain"], "depth": 3}))
    with pytest.raises(TrainingError, match=r"which the model has not$"):
        ALONE.load(folder / "none", fastvit.VisionTransformer(**{**OPTIONS["plain"], "depth": 1}))
    model = make(folder)
    with pytest.raises(TrainingError, match=r"it has no optimizer/.*momentum_buffer"):
        ALONE.load(folder / "none", model, torch.optim.SGD(model.parameters(), momentum=0.9))
    with pytest.raises(TrainingError, match="it has no "):
        ALONE.load(tmp_path, other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_shard_is_told(lost, folder, two, tmp_path):
    kept = sorted((folder / "fsdp").glob("*.safetensors"))[1 - lost]
    (tmp_path / kept.name).write_bytes(kept.read_bytes())
    reason = "does not fit: .* expected" if lost else "a shard of .* is missing"
    with pytest.raises(TrainingError, match=reason):
        ALONE.load(tmp_path, make(folder))


def test_a_checkpoint_of_before_the_first_step_leaves_the_optimiser_fresh(folder, tmp_path):
    model = make(folder)
    optimizer = optimizer_of(ALONE, model)
    ALONE.save(tmp_path, model, optimizer)
    assert not optimizer.state
    steps(ALONE, model, optimizer, range(1))
    ALONE.load(tmp_path, model, optimizer)
    assert not optimizer.state
    for name, tensor in make(folder).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_nothing_of_a_checkpoint_is_pickled(folder, two):
    files = {path.suffix for mode in MODES for path in (folder / mode).rglob("*")}
    assert files == {".safetensors"}


def test_whole_tensors_find_their_places(folder, two):
    assert all(seen[mode]["placed"] for seen in two for mode in MODES)
    model = make(folder)
    local = ALONE.local_tensors(model, {"blocks.0.attn.qkv.weight": torch.ones(96, 32)})
    assert torch.equal(local["blocks.0.attn.qkv.weight"], torch.ones(96, 32))
    with pytest.raises(TrainingError, match="'nowhere' is no parameter"):
        ALONE.local_tensors(model, {"nowhere": torch.ones(1)})


def test_start_says_what_is_wrong(monkeypatch):
    assert Parallel.start("auto", "cpu").mode == "none"
    with pytest.raises(ValueError, match="must be one of auto, none, ddp, fsdp, tp, got 'dp'"):
        Parallel.start("dp")
    with pytest.raises(ValueError, match="'fsdp' needs several processes: start it by torchrun"):
        Parallel.start("fsdp", "cpu")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ValueError, match="on 'cpu' or 'cuda', each on its own GPU, got 'cuda:1'"):
        Parallel.start("ddp", "cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="process 99 of this machine has no GPU of its own"):
        Parallel.start("ddp", "cuda")


def test_alone_everything_is_what_torch_does(folder):
    model = make(folder)
    assert ALONE.wrap(model) is model
    loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    with ALONE.accumulating(model, last=False):
        loss.backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(ALONE.clip(model, 0), wanted)
    torch.testing.assert_close(ALONE.clip(model, 0.5), wanted)
    torch.testing.assert_close(ALONE.clip(model, 0), torch.tensor(0.5))
    assert ALONE.mean(loss).item() == ALONE.sum(loss).item() == loss.item()
    assert not ALONE.sum(loss).requires_grad
    assert len(batch(0)[0]) == BATCH
