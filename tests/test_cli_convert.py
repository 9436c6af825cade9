"""`fastvit convert`: what it writes is what transformers and torchvision read, and a refusal writes nothing."""

import json
from pathlib import Path

import pytest
import torch
from models import randomize, timm
from safetensors.torch import load_file, save_file
from test_cli import run  # noqa: F401  (a fixture)
from tolerances import assert_close

transformers = pytest.importorskip("transformers")

CLASSES = 5


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return randomize(timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES)).eval()


@pytest.fixture
def weights(model: torch.nn.Module, tmp_path: Path) -> Path:
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


@pytest.mark.parity
def test_transformers_reads_what_is_written(run, model: torch.nn.Module, weights: Path, tmp_path: Path) -> None:  # noqa: F811
    code, out, err = run("convert", weights, tmp_path / "hf")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "ViTForImageClassification" in out
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        exact = model.double()(x.double())
        model.float()
        assert_close("logits", theirs(pixel_values=x).logits, exact, model(x))


def test_there_and_back_is_the_same_file(run, weights: Path, tmp_path: Path) -> None:  # noqa: F811
    there, back = tmp_path / "torchvision.safetensors", tmp_path / "back.safetensors"
    code, out, err = run("convert", weights, there, "--to", "torchvision", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["written"] == str(there)
    assert "heads.head.weight" in load_file(there)
    assert run("convert", there, back, "--to", "timm")[0] == 0
    before, after = load_file(weights), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_refusal_is_one_line_and_writes_nothing(run, weights: Path, tmp_path: Path) -> None:  # noqa: F811
    torch.save(load_file(weights), tmp_path / "vit.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 99)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    target = tmp_path / "out.safetensors"
    for arguments, words in (
        ((weights, target, "--to", "jax"), ("jax", "hf, timm, torchvision")),
        ((weights, tmp_path / "out.pt", "--to", "timm"), (".safetensors",)),
        ((tmp_path / "none", target, "--to", "timm"), ("none",)),
        ((tmp_path / "bad.safetensors", target, "--to", "timm"), ("bad.safetensors",)),
        ((tmp_path / "vit.pth", target, "--to", "timm"), ("vit.pth", "--weights-only")),
        ((weights, tmp_path / "there.safetensors", "--to", "timm"), ("there.safetensors", "--overwrite")),
        ((weights, tmp_path / "hf", "--num-heads", "7"), ("num_heads", "7")),
        ((weights, tmp_path / "hf", "--activation", "swiglu"), ("activation", "quick_gelu")),
        ((weights, target, "--to", "timm,hf"), ("layout must be one name",)),
    ):
        code, out, err = run("convert", *arguments)
        assert (code, out) == (1, ""), arguments
        assert err.startswith("fastvit: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err
    assert not target.exists()
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    assert run("convert", tmp_path / "vit.pth", target, "--to", "timm", "--weights-only")[0] == 0
    assert run("convert", weights, tmp_path / "there.safetensors", "--to", "timm", "--overwrite")[0] == 0
    assert load_file(target).keys() == load_file(tmp_path / "there.safetensors").keys()
    assert run("convert", weights)[0] == 2
