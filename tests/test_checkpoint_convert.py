"""convert_file: what it writes is what transformers' from_pretrained and the other libraries read."""

import copy
import json

import pytest
import safetensors.torch
import torch
from checkpoint_models import (
    REGISTERS,
    clip_with_head,
    distilled,
    output,
    save_hf,
    timm_vit,
    transformers,
    tv_vit,
    vit_hf,
    with_gate,
    write,
)
from models import images
from tolerances import assert_close

from fastvit import CheckpointError, convert_file, convert_state_dict, load_checkpoint


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (timm_vit, "ViTForImageClassification"),
        (lambda: timm_vit(num_classes=0), "ViTModel"),
        (distilled, "DeiTForImageClassificationWithTeacher"),
        (lambda: timm_vit(init_values=0.1, num_classes=0), "Dinov2Model"),
        (lambda: timm_vit(**REGISTERS), "Dinov2WithRegistersModel"),
        (with_gate, "Dinov2Model"),
        (clip_with_head, "CLIPVisionModelWithProjection"),
        (lambda: timm_vit(class_token=False, global_pool="map", num_classes=0), "SiglipVisionModel"),
    ],
)
def test_from_pretrained_reads_what_convert_file_writes(make, kind, tmp_path):
    source = make()
    said = convert_file(write(source, tmp_path), tmp_path / "out", to="hf", num_heads=3)
    assert kind in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [kind]
    options = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    model, report = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not report["missing_keys"] - {"embeddings.mask_token"}
    assert not report["unexpected_keys"]
    x = images()
    got = output(model.eval(), x)
    got = model(x).last_hidden_state[:, 0] if kind == "ViTModel" else got
    exact = output(copy.deepcopy(source).double(), x.double())
    assert_close("logits", got.detach(), exact, output(source, x))
    save_hf(model, tmp_path / "again")
    back = convert_state_dict(safetensors.torch.load_file(tmp_path / "again" / "model.safetensors"))
    assert all(torch.equal(back[key], value) for key, value in source.state_dict().items() if key in back)
    assert back.keys() - {"mask_token"} == source.state_dict().keys()


def test_convert_file_keeps_the_settings_of_transformers(tmp_path):
    source = vit_hf(hidden_act="quick_gelu", layer_norm_eps=1e-3)
    source.config.id2label = dict(enumerate("abcde"))
    convert_file(write(source, tmp_path), tmp_path / "out")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(model, images()), output(source, images()))
    assert model.config.id2label == source.config.id2label


def test_convert_file_overwrites_when_told_and_leaves_nothing_behind(tmp_path):
    path = write(timm_vit(), tmp_path)
    convert_file(path, tmp_path / "tv.safetensors", to="torchvision")
    load_checkpoint(tv_vit(), tmp_path / "tv.safetensors")
    with pytest.raises(CheckpointError, match="no published model is 48 wide; say num_heads"):
        convert_file(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert_file(path, tmp_path / "out", num_heads=3)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert_file(path, tmp_path / "out", num_heads=3)
    convert_file(path, tmp_path / "out", num_heads=3, overwrite=True)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
