"""`fastvit attention`: the figures show the numbers of timm's own softmax, and a refusal writes nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvit.benchmarks.images import photographs
from models import randomize, timm
from PIL import Image
from safetensors.torch import save_file
from test_cli import run  # noqa: F401  (a fixture)
from test_images import photo

from fastvit import figures

NAME = "vit_tiny_patch16_224"
SIDE, GRID = 64, (4, 4)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return randomize(timm.create_model(NAME, num_classes=3, img_size=SIDE)).eval()


@pytest.fixture
def attention(run, model: torch.nn.Module, tmp_path: Path):  # noqa: F811
    save_file(model.state_dict(), tmp_path / "vit.safetensors")

    def call(*arguments: object) -> tuple[int, str, str]:
        fixed = ("--checkpoint", tmp_path / "vit.safetensors", "--img-size", SIDE, "--device", "cpu", "--crop-pct", "1")
        return run("attention", *arguments, *fixed)

    return call


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The arguments of every figure that is drawn."""
    calls: list = []
    for name in ("attention", "positions", "filters", "distance"):
        original = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *given, _draw=original: calls.append(given) or _draw(*given))
    return calls


def softmax(model: torch.nn.Module, path: Path) -> list[torch.Tensor]:
    """timm's own attention of every layer, (H, N, N), with its fused path off."""
    transform = timm.data.create_transform(
        (3, SIDE, SIDE), is_training=False, interpolation="bicubic", crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    maps, handles = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _, __, out: maps.append(out[0])))
    with torch.no_grad():
        model(transform(Image.open(path).convert("RGB"))[None])
    for handle in handles:
        handle.remove()
    return maps


def close(weights: torch.Tensor, row: torch.Tensor) -> None:
    torch.testing.assert_close(weights, row[1:].view(GRID), rtol=1e-4, atol=1e-6)


@pytest.mark.parity
def test_the_overlay_shows_timms_softmax(attention, drawn, model: torch.nn.Module, tmp_path: Path) -> None:
    path, output = photographs()[0], tmp_path / "new" / "overlay.png"
    maps = softmax(model, path)
    code, out, err = attention(path, "-o", output)
    assert (code, out, err) == (0, f"{output}\n", "")
    pictures, weights, title, patch = drawn[-1]
    close(weights[0], maps[-1].mean(0)[0])
    assert ("layer -1" in title, patch) == (True, None)
    assert pictures[0].shape == (SIDE, SIDE, 3)
    with Image.open(output) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 10
    for options, expected in (
        (("--layer", 3, "--head", "max"), maps[3].amax(0)[0]),
        (("--head", 2, "--query", "1,2"), maps[-1][2][1 + 1 * 4 + 2]),
    ):
        assert attention(path, "-o", output, *options)[0] == 0
        close(drawn[-1][1][0], expected)
    rolled = torch.eye(17)
    for layer in maps:
        rolled = (0.5 * layer.mean(0) + 0.5 * torch.eye(17)) @ rolled
    for query, row in (("cls", 0), ("0,3", 4)):
        assert attention(path, "-o", output, "--rollout", "--query", query)[0] == 0
        close(drawn[-1][1][0], rolled[row])


@pytest.mark.parity
def test_the_distance_is_the_mean_over_images(attention, drawn, model: torch.nn.Module, tmp_path: Path) -> None:
    paths = photographs()
    code, out, err = attention(*paths, "-o", tmp_path / "far.svg", "--figure", "distance", "--json")
    assert (code, err) == (0, "")
    places = [(16 * (i // 4), 16 * (i % 4)) for i in range(16)]
    between = torch.tensor([[math.dist(a, b) for b in places] for a in places])
    each = []
    for path in paths:
        patches = [layer[:, 1:, 1:] for layer in softmax(model, path)]
        each.append(torch.stack([((a * between).sum(-1) / a.sum(-1)).mean(-1) for a in patches]))
    expected = torch.stack(each).mean(0)
    torch.testing.assert_close(torch.tensor(json.loads(out)["pixels"]), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn[-1][0], expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "far.svg").read_text().lstrip().startswith("<?xml")


def test_positions_and_filters_need_no_image(attention, drawn, model: torch.nn.Module, tmp_path: Path) -> None:
    assert attention("-o", tmp_path / "p.pdf", "--figure", "positions")[0] == 0
    table = model.pos_embed[0, 1:]
    expected = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=-1).detach()
    torch.testing.assert_close(drawn[-1][0].view(16, 16), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "p.pdf").read_bytes().startswith(b"%PDF")
    assert attention("-o", tmp_path / "f.png", "--figure", "filters")[0] == 0
    assert drawn[-1][0].shape == (28, 3, 16, 16)


def test_a_bright_patch_stays_and_the_rest_darkens() -> None:
    weights = torch.zeros(2, 2)
    weights[1, 0] = 0.25
    shown = figures.overlay(torch.ones(8, 8, 3), weights)
    assert shown[-1, 0].tolist() == [1, 1, 1]
    assert shown[0, -1].tolist() == [0, 0, 0]
    assert figures.overlay(torch.ones(4, 4, 3), torch.zeros(2, 2)).abs().max() == 0


def test_tiles_lie_row_by_row_with_gaps() -> None:
    page = figures._tiled(torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 3, 1), 3)[:, :, 0]
    assert page.shape == (2 * 3 - 1, 3 * 4 - 1)
    assert page[0, ::4].tolist() == [0, 1, 2]
    assert page[3, [0, 4]].tolist() == [3, 4]
    assert page[2].isnan().all() and page[3, 8:].isnan().all()


def test_an_unusable_image_is_named_and_the_others_are_drawn(attention, drawn, tmp_path: Path) -> None:
    photo(200, 100).save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    code, out, err = attention(tmp_path / "good.png", tmp_path / "empty.png", "-o", tmp_path / "o.png", "--json")
    assert code == 1
    assert len(drawn[-1][0]) == 1
    assert json.loads(out)["failures"] == [f"{tmp_path / 'empty.png'}: the file is empty"]
    assert err.splitlines()[-1] == "fastvit: attention: 1 of 2 FAILED, see above"
    (tmp_path / "o.png").unlink()
    assert attention(tmp_path / "empty.png", "-o", tmp_path / "o.png")[:2] == (1, "")
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--figure", "colours"), 1, ("unknown figure", "positions")),
        (("--figure", "positions,filters"), 1, ("figure must be one name",)),
        (("--layer", "12"), 1, ("layers", "12")),
        (("--head", "3"), 1, ("heads", "3")),
        (("--head", "min"), 1, ("head must be mean, max or a number",)),
        (("--query", "4,0"), 1, ("4 x 4 patches",)),
        (("--query", "left"), 1, ("row,column",)),
        (("--rollout", "--layer", "2"), 1, ("--layer",)),
        (("--rollout", "--head", "1"), 1, ("--head",)),
        (("-o", "{tmp}/chart.txt"), 1, ("chart.txt", ".png")),
        (("-o", "{tmp}"), 1, (".png",)),
        (("-o", "{tmp}/one.jpg/new/o.png"), 1, ("o.png", "one.jpg is no directory")),
        (("-o", "{tmp}/new/../two.png"), 1, ("two.png", "an image to be read")),
        (("--weights", "x"), 2, ("--weights",)),
    ],
)
def test_wrong_requests_fail_in_one_line_and_write_nothing(attention, tmp_path: Path, arguments, code, words) -> None:
    photo().save(tmp_path / "one.jpg")
    photo().save(tmp_path / "two.png")
    (tmp_path / "new").mkdir()
    before = (tmp_path / "two.png").read_bytes()
    target = () if "-o" in arguments else ("-o", tmp_path / "o.png")
    got, out, err = attention(
        tmp_path / "one.jpg", tmp_path / "two.png", *target, *(a.format(tmp=tmp_path) for a in arguments)
    )
    assert (got, out) == (code, ""), err
    assert err.startswith("fastvit: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not (tmp_path / "o.png").exists()
    assert (tmp_path / "two.png").read_bytes() == before


def test_an_image_is_asked_for_where_one_is_needed(attention, tmp_path: Path) -> None:
    assert attention("-o", tmp_path / "o.png")[2] == "fastvit: --figure attention needs images\n"
    assert attention()[0] == 2
