"""`fastvit classify --checkpoint DIRECTORY`: what transformers saved, against transformers' own model and processor."""

import json
from pathlib import Path

import pytest
import torch
from fastvit.benchmarks.images import photographs
from models import randomize, timm
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import run  # noqa: F401  (a fixture)

from fastvit import figures
from fastvit.images import Preprocessing

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 16,
    "id2label": {i: f"label {i}" for i in range(7)},
    "label2id": {f"label {i}": i for i in range(7)},
}


def vit():
    config = transformers.ViTConfig(**SMALL, intermediate_size=100, hidden_act="gelu_new")
    return transformers.ViTForImageClassification(config), transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    )


def deit():
    config = transformers.DeiTConfig(**SMALL, intermediate_size=96)
    return transformers.DeiTForImageClassificationWithTeacher(config), transformers.DeiTImageProcessor(
        size={"height": 72, "width": 72}, crop_size={"height": 64, "width": 64}
    )


def dinov2():
    config = transformers.Dinov2Config(**{**SMALL, "patch_size": 14, "image_size": 70}, mlp_ratio=2)
    return transformers.Dinov2ForImageClassification(config), transformers.BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def save(folder: Path, make) -> tuple[torch.nn.Module, object]:
    model, processor = make()
    randomize(model).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Copies: the file, which the originals are a view of, is written again."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parity
@pytest.mark.parametrize(
    "processor",
    [
        transformers.CLIPImageProcessor(),
        transformers.SiglipImageProcessor(size={"height": 50, "width": 60}),
        transformers.BitImageProcessor(size={"shortest_edge": 61}, crop_size={"height": 56, "width": 30}),
        transformers.BitImageProcessor(size={"shortest_edge": 31}, crop_size={"height": 40, "width": 33}),
        transformers.ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_images_are_prepared_as_its_processors_do(processor) -> None:
    ours = Preprocessing.of_transformers(json.loads(processor.to_json_string()))
    for path in photographs():
        image = Image.open(path)
        theirs = processor([image], return_tensors="pt")["pixel_values"][0]
        level = 1 / (ours.divisor * torch.tensor(ours.std).view(3, 1, 1))
        difference = (ours(image) - theirs).abs() / level
        # its processors resize with torchvision, ours with pillow: a level of 255 apart, now and then
        assert difference.max() < 1.01
        assert difference.mean() < 0.02


def test_another_side_keeps_the_share_that_is_cropped() -> None:
    three = (0.5, 0.5, 0.5)
    short = Preprocessing(256, (224, 224), three, three)
    assert (short.at(448).resize, short.at(448).crop) == (512, (448, 448))
    assert Preprocessing((256, 512), (224, 448), three, three).at(112).resize == (128, 128)
    assert Preprocessing((224, 224), None, three, three).at(32).size == (32, 32)
    assert Preprocessing(224, None, three, three).size is None
    assert Preprocessing(None, None, three, three).at(32).size == (32, 32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "large"},
        {"size": {"shortest_edge": -1}},
        {"size": {"height": 224}},
        {"size": {"height": 10**6, "width": 3}},
        {"resample": 9},
        {"image_std": [0, 1, 1]},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": [0.5, None, 0.5]},
        {"rescale_factor": 0},
    ],
    ids=str,
)
def test_a_processor_that_means_nothing_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="got "):
        Preprocessing.of_transformers(wrong)


@pytest.mark.parity
@pytest.mark.parametrize("make", [vit, deit, dinov2])
def test_a_saved_classifier_answers_as_transformers_does(run, tmp_path: Path, make) -> None:  # noqa: F811
    model, processor = save(tmp_path, make)
    paths = photographs()
    code, out, err = run("classify", *paths, "--checkpoint", tmp_path, "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    with torch.no_grad():
        pixels = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
        shares = model(pixel_values=pixels).logits.softmax(-1)
    for image, row in zip(told["images"], shares, strict=True):
        assert [guess["label"] for guess in image["top"]] == [f"label {i}" for i in row.topk(5).indices.tolist()]
        assert [guess["probability"] for guess in image["top"]] == pytest.approx(row.topk(5).values.tolist(), abs=2e-3)


def test_what_is_wrong_in_a_directory_is_named(run, tmp_path: Path) -> None:  # noqa: F811
    save(tmp_path, vit)
    photograph = photographs()[0]
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(*words: str, **changed: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        code, out, err = run("classify", photograph, "--checkpoint", tmp_path, "--device", "cpu")
        assert (code, out) == (1, ""), err
        assert all(word in err for word in words), err

    refused("does not classify", architectures=["ViTModel"])
    refused("channels", num_channels=4)
    refused("model_type", model_type=None)
    refused("(64, 64)", "(96, 96)", image_size=96)
    refused("image_size", image_size="large")
    refused("divisor", num_attention_heads=5)
    refused("3 labels, but none for class 1", id2label={"0": "a", "2": "b", "3": "c"})
    refused("head", id2label={"0": "a", "1": "b"})
    weights = weights_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    refused("model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    refused("model.safetensors")
    save_file({n: t for n, t in weights.items() if "classifier" not in n}, tmp_path / "model.safetensors")
    refused("head.weight")
    (tmp_path / "preprocessor_config.json").unlink()
    refused("preprocessor_config.json", "--mean and --std")


def test_a_model_of_transformers_own_is_refused_when_half_of_it_is_missing(run, tmp_path: Path) -> None:  # noqa: F811
    save(tmp_path, dinov2)
    weights = weights_of(tmp_path)
    kept = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run("classify", photographs()[0], "--checkpoint", tmp_path, "--device", "cpu")
    assert (code, out) == (1, "")
    assert "classifier.bias" in err


def clip():
    vision = {**SMALL, "intermediate_size": 96}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return transformers.CLIPModel(config), transformers.CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )


def bare_dinov2():
    config = transformers.Dinov2Config(**{**SMALL, "patch_size": 14, "image_size": 70}, mlp_ratio=2)
    return transformers.Dinov2Model(config), dinov2()[1]


@pytest.mark.parity
@pytest.mark.parametrize("make", [vit, bare_dinov2, clip])
def test_the_attention_of_a_saved_model_is_drawn(run, tmp_path: Path, monkeypatch, make) -> None:  # noqa: F811
    model, processor = save(tmp_path, make)
    weights: list = []
    draw = figures.attention
    monkeypatch.setattr(figures, "attention", lambda *given: weights.append(given[1][0]) or draw(*given))
    path = photographs()[0]
    code, _, err = run("attention", path, "-o", tmp_path / "o.png", "--checkpoint", tmp_path, "--device", "cpu")
    assert (code, err) == (0, "")
    model = getattr(model, "vision_model", model)
    model.set_attn_implementation("eager")
    pixels = processor([Image.open(path)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        row = model(pixel_values=pixels, output_attentions=True).attentions[-1][0, :, 0].mean(0)
    torch.testing.assert_close(weights[0].flatten(), row[1:], rtol=0.05, atol=1e-3)


def test_another_size_and_another_crop_can_be_asked_for(run, tmp_path: Path) -> None:  # noqa: F811
    save(tmp_path, vit)
    tops = []
    for options in ((), ("--img-size", 96), ("--crop-pct", 0.9), ("--mean", 0.5, "--std", 0.5)):
        code, out, err = run("classify", photographs()[0], "--checkpoint", tmp_path, "--json", *options)
        assert (code, err) == (0, "")
        tops.append(out)
    assert len(set(tops)) == 4


def test_a_side_that_is_no_multiple_of_the_patches_is_refused(run, tmp_path: Path) -> None:  # noqa: F811
    save(tmp_path, vit)
    code, out, err = run("classify", *photographs(), "--checkpoint", tmp_path, "--img-size", 90)
    assert (code, out) == (1, "")
    assert "img-size 90 is not divisible by the patches" in err and err.count("\n") == 1


def test_what_convert_writes_of_another_model_is_drawn(run, tmp_path: Path) -> None:  # noqa: F811
    """timm's DINOv2 has no mask token, which transformers' model has and no image needs."""
    model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, embed_dim=48, depth=1, num_heads=3)
    save_file(randomize(model).state_dict(), tmp_path / "dino.safetensors")
    code, out, err = run("convert", tmp_path / "dino.safetensors", tmp_path / "dino", "--num-heads", 3)
    assert (code, err) == (0, "")
    assert "Dinov2WithRegistersModel (3 heads, gelu)" in out
    options = ("--checkpoint", tmp_path / "dino", "--mean", "0.5", "--std", "0.5", "--device", "cpu")
    target = tmp_path / "drawn.png"
    code, _, err = run("attention", photographs()[0], "-o", target, *options)
    assert (code, err) == (0, "")
    assert target.exists()
