"""`fastvit figures`: every figure with the numbers of timm's own softmax, a page without dead links, and reasons."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_models import hf, save_hf, transformers
from fastvit.benchmarks.images import photographs
from PIL import Image
from safetensors.torch import save_file
from test_cli import run  # noqa: F401  (a fixture)
from test_cli_attention import GRID, NAME, SIDE, close, drawn, model, softmax  # noqa: F401  (fixtures among them)
from test_images import photo

from fastvit import compute, figures as drawing

ROWS = [
    compute.Row("R50x1", "ResNet", 224, 224, 25_549_352, 4_089_184_256),
    compute.Row("S/16", "ViT", 224, 224, 22_050_664, 4_598_882_304),
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's models take seconds; test_compute.py has them."""
    monkeypatch.setattr(compute, "papers_rows", lambda timm=None: iter([*ROWS, ("R200x3", "needs timm")]))


@pytest.fixture
def figures(run, model: torch.nn.Module, tmp_path: Path):  # noqa: F811
    save_file(model.state_dict(), tmp_path / "vit.safetensors")

    def call(*arguments: object, place: object = None) -> tuple[int, str, str]:
        fixed = ("--img-size", SIDE, "--device", "cpu", "--crop-pct", "1")
        return run("figures", place or tmp_path / "vit.safetensors", *arguments, *fixed)

    return call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn, which takes most of a test's time."""
    monkeypatch.setattr(drawing, "save", lambda figure, path: Path(path).parent.mkdir(exist_ok=True))


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parity
def test_all_figures_from_timms_numbers(figures, drawn, model: torch.nn.Module, tmp_path: Path) -> None:  # noqa: F811
    paths, folder = photographs(), tmp_path / "new" / "figures"
    code, out, err = figures(*paths, "-o", folder, "--json", "--rollouts", 1)
    assert (code, err) == (0, "")
    told = json.loads(out)
    names = ["rollout.png", "distance.png", "distance.csv", "positions.png", "filters.png"]
    assert [Path(path).name for path in told["written"]] == [
        *names,
        *("compute.png", "compute.csv", "compute.md", "index.html"),
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(path).name for path in told["written"])
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert 700 <= image.width <= 1600, path
    maps = [softmax(model, path) for path in paths]
    rolled = torch.eye(17)
    for layer in maps[0]:
        rolled = (0.5 * layer.mean(0) + 0.5 * torch.eye(17)) @ rolled
    (pictures, weights, *_), (distances,), (positions,), (filters,) = drawn
    assert len(pictures) == 1
    close(weights[0], rolled[0])
    y, x = torch.arange(16) // 4 * 16.0, torch.arange(16) % 4 * 16.0
    between = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).sqrt()
    each = [[((a[:, 1:, 1:] * between).sum(-1) / a[:, 1:, 1:].sum(-1)).mean(-1) for a in layers] for layers in maps]
    expected = torch.stack([torch.stack(layers) for layers in each]).mean(0)
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-4)
    written = [[float(row[f"head_{head}"]) for head in range(3)] for row in table(folder / "distance.csv")]
    torch.testing.assert_close(torch.tensor(written), expected, rtol=1e-4, atol=1e-4)
    assert positions.shape == (*GRID, *GRID) and filters.shape == (28, 3, 16, 16)
    rows = {row["model"]: row for row in table(folder / "compute.csv")}
    assert (rows["R50x1"]["gmacs"], rows["R50x1"]["asked"]) == ("4.089184256", "0")
    parameters = sum(p.numel() for p in model.parameters())
    assert int(rows[NAME]["parameters"]) == parameters
    # 16 patches of 768 values; per block 12 D² N + 2 N² D; a head of 3 classes
    by_hand = 16 * 768 * 192 + 12 * (12 * 192**2 * 17 + 2 * 17**2 * 192) + 3 * 192
    assert (rows[NAME]["gmacs"], rows[NAME]["asked"]) == (str(by_hand / 1e9), "1")
    assert "| **vit_tiny_patch16_224** |" in (folder / "compute.md").read_text()
    assert told["left_out"] == {"R200x3": "needs timm"}


def test_the_page_shows_what_is_there(figures, tmp_path: Path) -> None:
    photo(200, 100).save(tmp_path / "one.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rollout.svg").write_text("of the last time")
    code, out, err = figures(tmp_path / "one.png", "-o", tmp_path / "out", "--format", "svg")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == str(tmp_path / "out" / "rollout.svg")
    assert out.splitlines()[-1] == "R200x3: left out, needs timm"
    page = (tmp_path / "out" / "index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {"rollout.svg", "distance.csv", "compute.md"} <= set(links)
    assert all((tmp_path / "out" / link).exists() for link in links if not link.startswith("https://arxiv.org/"))
    assert page.count("<img ") == 5
    assert page.count("<tr") == 4 and page.count('<tr class="asked">') == 1
    assert "<script" not in page


@pytest.mark.parity
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("kind", "absent", "reason"),
    [("SiglipVisionModel", "rollout", "no class token"), ("DINOv3ViTModel", "positions", "no table of positions")],
)
def test_what_a_model_does_not_have_is_left_out(run, tmp_path: Path, kind: str, absent: str, reason: str) -> None:  # noqa: F811
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    save_hf(hf(kind), tmp_path / "model")
    size = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(size))
    photo().save(tmp_path / "one.png")
    code, out, err = run("figures", tmp_path / "model", tmp_path / "one.png", "-o", tmp_path / "out", "--json")
    assert (code, err) == (0, ""), out
    told = json.loads(out)
    assert set(told["left_out"]) == {absent, "R200x3"}
    assert reason in told["left_out"][absent]
    written = [Path(path).name for path in told["written"]]
    assert f"{absent}.png" not in written and {"distance.png", "compute.png"} <= set(written)
    page = (tmp_path / "out" / "index.html").read_text()
    assert reason in page and f"{absent}.png" not in page


@pytest.mark.usefixtures("quick")
def test_a_hybrid_is_one(figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvit.integrations import embeddings

    whole = embeddings._timm

    def without_filters(module: torch.nn.Module):
        found = whole(module)
        return found and found._replace(weight=None)

    monkeypatch.setattr(embeddings, "_timm", without_filters)
    photo().save(tmp_path / "one.png")
    code, out, _ = figures(tmp_path / "one.png", "-o", tmp_path / "out", "--json")
    told = json.loads(out)
    assert code == 0
    assert "does not project patches of pixels" in told["left_out"]["filters"]
    assert [row["family"] for row in told["compute"]] == ["ResNet", "hybrid", "ViT"]


@pytest.mark.usefixtures("quick")
def test_an_unusable_image_is_named_and_the_others_are_drawn(figures, drawn, tmp_path: Path) -> None:  # noqa: F811
    for number in range(4):
        photo(100 + number, 90).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"")
    code, out, err = figures(tmp_path / "*.png", "-o", tmp_path / "out", "--json")
    assert code == 1
    assert json.loads(out)["failures"] == [f"{tmp_path / '4.png'}: the file is empty"]
    assert err.splitlines()[-1] == "fastvit: figures: 1 of 5 images FAILED, see above"
    assert len(drawn[0][0]) == 4
    figure = drawing.attention(*drawn[0])
    shown = [axes for axes in figure.axes if axes.images]
    assert (len(figure.axes), len(shown)) == (12, 8), "three pairs in a row, and what is left of the second is empty"


@pytest.mark.usefixtures("quick")
def test_a_name_is_a_model_too(figures, tmp_path: Path) -> None:
    photo().save(tmp_path / "one.png")
    code, out, err = figures(tmp_path / "one.png", "-o", tmp_path / "a", "--random-weights", "--json", place=NAME)
    assert (code, err) == (0, "")
    assert json.loads(out)["model"] == NAME
    code, out, err = figures(tmp_path / "one.png", "-o", tmp_path / "b", place=NAME)
    assert (code, out) == (1, "") and "--checkpoint is missing" in err


@pytest.mark.parametrize(
    ("arguments", "place", "words"),
    [
        (("-o", "{tmp}/one.jpg"), None, ("one.jpg", "a file, not a folder")),
        (("-o", "{tmp}/one.jpg/new"), None, ("one.jpg is no directory",)),
        (("-o", "{tmp}/out", "--format", "gif"), None, ("unknown format 'gif'", "png, svg, pdf")),
        (("-o", "{tmp}/out"), "vit_tiny_patch16", ("unknown model", "vit_tiny_patch16_224", "checkpoint")),
        (("-o", "{tmp}/out", "--checkpoint", "x.npz"), None, ("two checkpoints",)),
        (("-o", "{tmp}/out", "--random-weights"), None, ("exclude each other",)),
    ],
)
def test_wrong_requests_fail_in_one_line_and_write_nothing(figures, tmp_path: Path, arguments, place, words) -> None:
    photo().save(tmp_path / "one.jpg")
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = figures(tmp_path / "one.jpg", *(a.format(tmp=tmp_path) for a in arguments), place=place)
    assert (code > 0, out) == (True, ""), err
    assert err.startswith("fastvit: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_no_image_and_no_matplotlib(figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    code, out, err = figures(tmp_path / "empty.png", "-o", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "fastvit: figures: no image could be read"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = figures(tmp_path / "empty.png", "-o", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err == 'fastvit: figures need matplotlib:  pip install "fastvit[bench]"\n'
    assert not (tmp_path / "out").exists()
