"""`fastvit classify`: timm's and transformers' probabilities, labels of every form, and images that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastvit.benchmarks.images import photographs
from models import randomize, timm
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import run  # noqa: F401  (a fixture)
from test_images import photo, png_without_pixels

import fastvit

NAME = "vit_tiny_patch16_224"
CLASSES = 11
LABELS = [f"label {number}, with blanks" for number in range(CLASSES)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return randomize(timm.create_model(NAME, num_classes=CLASSES)).eval()


@pytest.fixture(scope="module")
def folder(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, labels in every form, and a small photograph in a directory of its own."""
    here = tmp_path_factory.mktemp("classify")
    save_file(model.state_dict(), here / "vit.safetensors")
    (here / "labels.txt").write_text("\n".join(LABELS) + "\n\n")
    (here / "labels.json").write_text(json.dumps(LABELS))
    (here / "numbered.json").write_text(json.dumps({str(i): label for i, label in enumerate(LABELS)}))
    (here / "config.json").write_text(json.dumps({"id2label": {str(i): label for i, label in enumerate(LABELS)}}))
    (here / "photos").mkdir()
    photo().save(here / "photos" / "one.png")
    return here


@pytest.fixture
def classify(run, folder: Path):  # noqa: F811
    def call(*arguments: object) -> tuple[int, str, str]:
        fixed = ("--model", NAME, "--checkpoint", folder / "vit.safetensors", "--device", "cpu")
        return run("classify", *arguments, *fixed)

    return call


def expected(model: torch.nn.Module, paths: list[Path], **options) -> torch.Tensor:
    """timm's own transform and model: softmax, fp32 (B, K)."""
    options = {"crop_pct": 0.9, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **options}
    transform = timm.data.create_transform((3, 224, 224), is_training=False, interpolation="bicubic", **options)
    opened = [Image.open(path).convert("RGB") for path in paths]
    with torch.no_grad():
        return model(torch.stack([transform(image) for image in opened])).softmax(-1)


def same(told: list[dict], shares: torch.Tensor, tolerance: float = 1e-5) -> None:
    for image, row in zip(told, shares, strict=True):
        top = row.topk(5)
        assert [guess["index"] for guess in image["top"]] == top.indices.tolist()
        assert [guess["probability"] for guess in image["top"]] == pytest.approx(top.values.tolist(), abs=tolerance)


@pytest.mark.parity
def test_photographs_get_timms_probabilities(classify, model: torch.nn.Module, folder: Path) -> None:
    paths = [*photographs(), folder / "photos" / "one.png"]
    code, out, err = classify(*paths, "--labels", folder / "labels.txt", "--json", "--batch-size", 2)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [image["image"] for image in told["images"]] == [str(path) for path in paths]
    assert all(guess["label"] == LABELS[guess["index"]] for image in told["images"] for guess in image["top"])
    same(told["images"], expected(model, paths))
    other = {"crop_pct": 1.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    texts = {name: ",".join(map(str, value)) if name != "crop_pct" else value for name, value in other.items()}
    arguments = [word for name, value in texts.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, out, err = classify(paths[0], *arguments, "--json", "--no-accelerate")
    assert (code, err) == (0, "")
    same(json.loads(out)["images"], expected(model, paths[:1], **other))


def test_the_checkpoint_says_which_model_it_is(run, folder: Path) -> None:  # noqa: F811
    code, out, err = run("classify", folder / "photos", "--checkpoint", folder / "vit.safetensors", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["model"] == NAME
    large = {name: tensor.clone() for name, tensor in load_file(folder / "vit.safetensors").items()}
    large["pos_embed"] = torch.randn(1, 24 * 24 + 1, 192)
    save_file(large, folder / "large.safetensors")
    code, out, err = run("classify", folder / "photos", "--checkpoint", folder / "large.safetensors", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["model"] == "vit_tiny_patch16_384"
    del large["blocks.11.norm1.weight"]
    shallow = {name: tensor for name, tensor in large.items() if ".11." not in name}
    save_file(shallow, folder / "shallow.safetensors")
    code, _, err = run("classify", folder / "photos", "--checkpoint", folder / "shallow.safetensors")
    assert code == 1
    assert "192 wide and 11 deep" in err


@pytest.mark.parity
def test_torchvisions_weights_come_with_its_preprocessing(run, tmp_path: Path) -> None:  # noqa: F811
    torchvision = pytest.importorskip("torchvision")
    theirs = randomize(
        torchvision.models.VisionTransformer(
            image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=CLASSES
        )
    ).eval()
    save_file(theirs.state_dict(), tmp_path / "torchvision.safetensors")
    code, out, err = run("classify", *photographs(), "--checkpoint", tmp_path / "torchvision.safetensors", "--json")
    assert (code, err) == (0, "")
    transform = torchvision.transforms._presets.ImageClassification(crop_size=224, resize_size=256)
    with torch.no_grad():
        shares = theirs(torch.stack([transform(Image.open(path)) for path in photographs()])).softmax(-1)
    same(json.loads(out)["images"], shares, 1e-4)


def test_a_pipe_gets_aligned_rows_and_a_terminal_a_table(
    classify, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (folder / "photos", "--labels", folder / "labels.json", "--topk", 3, "--dtype", "bf16")
    code, out, err = classify(*arguments)
    assert (code, err) == (0, "")
    heading, *rows = out.splitlines()
    assert heading.split() == ["image", "rank", "probability", "class", "label"]
    assert [row.split()[:2] for row in rows] == [[str(folder / "photos" / "one.png"), str(n)] for n in (1, 2, 3)]
    assert all(row.endswith(LABELS[int(row.split()[3])]) for row in rows)
    shares = [float(row.split()[2]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) < 1
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = classify(*arguments)
    assert code == 0
    assert "one.png" in out
    assert f"{shares[0]:.2%}" in out
    assert "1/1 images" in err, "a bar on stderr"


def test_labels_come_in_every_form_or_not_at_all(classify, folder: Path) -> None:
    answers = set()
    for name in ("labels.txt", "labels.json", "numbered.json", "config.json"):
        code, out, err = classify(folder / "photos/*.png", "--labels", folder / name, "--json", "--topk", 100)
        assert (code, err) == (0, "")
        answers.add(out)
    (answer,) = answers
    top = json.loads(answer)["images"][0]["top"]
    assert len(top) == CLASSES
    assert sum(guess["probability"] for guess in top) == pytest.approx(1)
    code, out, _ = classify(folder / "photos")
    assert code == 0
    assert len(out.splitlines()[1].split()) == 4, "no label, only the number of the class"


def test_unusual_images_are_classified_as_what_they_show(classify, tmp_path: Path) -> None:
    plain, exif = photo(300, 240), Image.Exif()
    plain.save(tmp_path / "a.png")
    exif[0x0112] = 6
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b_rotated.png", exif=exif)
    alpha = plain.convert("RGBA")
    alpha.putalpha(7)
    alpha.save(tmp_path / "c_alpha.png")
    plain.save(tmp_path / "d.tif", save_all=True, append_images=[photo(300, 240, "L").convert("RGB")])
    grey = np.linspace(0, 65535, 300 * 240).astype(np.uint16).reshape(240, 300)
    Image.fromarray(grey).save(tmp_path / "x_deep.png")
    Image.fromarray((grey // 257).astype(np.uint8)).save(tmp_path / "y_shallow.png")
    plain.convert("CMYK").save(tmp_path / "z_cmyk.jpg", quality=100, subsampling=0)
    code, out, err = classify(tmp_path, "--json", "--topk", CLASSES)
    assert (code, err) == (0, "")
    told = {Path(image["image"]).name: image["top"] for image in json.loads(out)["images"]}
    assert len(told) == 7
    assert told["a.png"] == told["b_rotated.png"] == told["c_alpha.png"] == told["d.tif"] != told["x_deep.png"]

    def by_class(name: str) -> list[float]:
        return [guess["probability"] for guess in sorted(told[name], key=lambda guess: guess["index"])]

    assert by_class("x_deep.png") == pytest.approx(by_class("y_shallow.png"), abs=5e-3)
    assert by_class("z_cmyk.jpg") == pytest.approx(by_class("a.png"), abs=5e-2)


def test_an_unusable_image_is_named_and_the_others_are_classified(classify, folder: Path, tmp_path: Path) -> None:
    photo(300, 200).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    bad = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"),
        "empty.png": (b"", "empty"),
        "text.png": (b"hello\n" * 100, "not an image"),
        "huge.png": (png_without_pixels(8000, 8000), "8000 x 8000"),
        "bomb.png": (png_without_pixels(60000, 60000), "50,000,000"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    Image.new("L", (1, 40_000)).save(tmp_path / "thread.png")
    (tmp_path / "bare").mkdir()
    others = (tmp_path / "none.jpg", tmp_path / "bare", tmp_path / "*.bmp", "a\nb.png", "x" * 5000)
    code, out, err = classify(tmp_path, *others, folder / "photos", "--json", "--batch-size", 3)
    assert code == 1
    told = json.loads(out)
    assert [Path(image["image"]).name for image in told["images"]] == ["good.jpg", "one.png"]
    lines = err.splitlines()
    assert lines[:-1] == [f"fastvit: {reason}" for reason in told["failures"]]
    assert lines[-1] == "fastvit: classify: 11 of 13 FAILED, see above"
    reasons = {name: reason for name, (_, reason) in bad.items()} | {"thread.png": "elongated", "none.jpg": "no such"}
    for name, reason in {**reasons, "bare": "no images", "*.bmp": "matches no image", "b.png": "no such"}.items():
        assert any(f"{name}: " in line and reason in line for line in lines), (name, err)
    code, out, err = classify(tmp_path / "empty.png")
    assert (code, out) == (1, "")
    assert err.count("\n") == 2


def test_logits_that_are_not_finite_are_no_answer(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    create = fastvit.create_model

    def broken(*arguments, **options):
        built = create(*arguments, **options)
        torch.nn.init.constant_(built.head.bias, torch.inf)
        return built

    monkeypatch.setattr(fastvit, "create_model", broken)
    code, out, err = run("classify", folder / "photos", "--model", NAME, "--random-weights", "--device", "cpu")
    assert (code, out) == (1, "")
    assert "one.png: the logits are not finite" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 1, ("--checkpoint is missing", "--random-weights")),
        (("--random-weights", "--model", "vit_tinny_patch16_224"), 1, ("unknown model", NAME)),
        (("--random-weights", "--dtype", "int4"), 1, ("unknown dtype", "bfloat16")),
        (("--random-weights", "--backend", "opencl"), 1, ("unknown backend", "reference")),
        (("--random-weights", "--backend", "cpu", "--no-accelerate"), 1, ("exclude",)),
        (("--random-weights", "--backend", "cuda"), 1, ("--backend cuda: ",)),
        (("--random-weights", "--dtype", "float32,bfloat16"), 1, ("dtype must be one name",)),
        (("--random-weights", "--img-size", "16000000"), 2, ("--img-size", "10000")),
        (("--random-weights", "--device", "tpu"), 1, ("unknown device",)),
        (("--random-weights", "--img-size", "225"), 1, ("img-size 225", "16")),
        (("--random-weights", "--mean", "1,2"), 1, ("mean", "three")),
        (("--random-weights", "--std", "0"), 1, ("std",)),
        (("--random-weights", "--checkpoint", "{folder}/vit.safetensors"), 1, ("exclude",)),
        (("--random-weights", "--labels", "{folder}/none.txt"), 1, ("none.txt", "No such file")),
        (("--random-weights", "--labels", "{folder}/vit.safetensors"), 1, ("vit.safetensors", "not text|allowed")),
        (("--random-weights", "--labels", "{folder}/gap.json"), 1, ("gap.json", "class 1")),
        (("--random-weights", "--labels", "{folder}/text.json"), 1, ("text.json", "not JSON")),
        (("--random-weights", "--labels", "{folder}/labels.txt"), 1, ("11 labels", "1000 classes")),
        (("--checkpoint", "{folder}/headless.safetensors"), 1, ("headless", "without a head")),
        (("--checkpoint", "{folder}/labels.txt"), 1, ("labels.txt",)),
        (("--checkpoint", "{folder}/pickled.pth"), 1, ("pickled.pth", "--weights-only")),
        (("--checkpoint", "{folder}/vit.safetensors", "--model", "vit_small_patch16_224"), 1, ("(192,", "(384,")),
        (("--checkpoint", "{folder}/none.pth"), 1, ("none.pth", "no such checkpoint")),
        (("--checkpoint", "{folder}/photos"), 1, ("config.json", "No such file")),
        (("--checkpoint", "{folder}", "--model", NAME), 1, ("config.json", "--model")),
        (("--topk", "0"), 2, ("--topk",)),
        (("--crop-pct", "1.5"), 2, ("--crop-pct",)),
        (("--speed", "9"), 2, ("--speed",)),
    ],
)
def test_wrong_requests_fail_in_one_line(run, folder: Path, arguments, code: int, words) -> None:  # noqa: F811
    (folder / "gap.json").write_text('{"0": "a", "2": "b"}')
    (folder / "text.json").write_text("no json")
    torch.save({"weight": torch.zeros(3)}, folder / "pickled.pth")
    weights = load_file(folder / "vit.safetensors")
    save_file({n: t for n, t in weights.items() if not n.startswith("head.")}, folder / "headless.safetensors")
    model = () if "--model" in arguments or "{folder}/photos" in arguments else ("--model", NAME)
    got, out, err = run("classify", folder / "photos", *(a.format(folder=folder) for a in arguments), *model)
    assert (got, out) == (code, ""), err
    assert err.startswith("fastvit: ")
    assert err.count("\n") == 1, err
    assert all(any(part in err for part in word.split("|")) for word in words), err


def test_help_names_every_option(run) -> None:  # noqa: F811
    code, out, _ = run("classify", "--help")
    assert code == 0
    for option in ("checkpoint", "labels", "topk", "batch-size", "no-accelerate", "crop-pct", "random-weights", "json"):
        assert f"--{option}" in out
