"""attention_maps against what transformers and torchvision show when asked: output_attentions, need_weights."""

import copy

import pytest
import torch
from models import images, randomize
from test_maps import ACCELERATED, DTYPES, check
from torch import nn

import fastvit

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 64,
}
# name of the configuration, of the model, options, prefix tokens
TRANSFORMERS = [
    ("ViTConfig", "ViTModel", {"qkv_bias": False}, 1),
    ("DeiTConfig", "DeiTModel", {}, 2),
    ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2}, 1),
    ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2, "use_swiglu_ffn": True}, 1),
    ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"mlp_ratio": 2, "num_register_tokens": 2}, 3),
    ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 2}, 3),
    ("BeitConfig", "BeitModel", {"use_relative_position_bias": True}, 1),
    ("BeitConfig", "BeitModel", {"use_shared_relative_position_bias": True}, 1),
    ("CLIPVisionConfig", "CLIPVisionModel", {}, 1),
    ("SiglipVisionConfig", "SiglipVisionModel", {}, 0),
]


def transformers_model(config, model, options):
    made = getattr(transformers, config)(**{**SIZES, **options})
    return randomize(getattr(transformers, model)(made)).eval()


def transformers_softmax(model, x):
    model = fastvit.restore(copy.deepcopy(model))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(x, output_attentions=True).attentions


@DTYPES
@ACCELERATED
@pytest.mark.parametrize(
    ("config", "model", "options", "prefix"), TRANSFORMERS, ids=lambda v: v if isinstance(v, str) else None
)
def test_transformers(config, model, options, prefix, accelerated, dtype):
    made = transformers_model(config, model, options)
    check(model, made, transformers_softmax, images(), dtype, accelerated)
    patch = fastvit.attention_maps(made, images(), -1, [(2, 1)])[0]
    index = fastvit.attention_maps(made, images(), -1, prefix + 9)[0]
    assert torch.equal(patch, index)
    assert index.shape[-1] == prefix + 16
    if prefix:
        assert fastvit.attention_maps(made, {"pixel_values": images()}, -1)[0].shape == (2, 3, 1, prefix + 16)
    else:
        with pytest.raises(ValueError, match="no class token"):
            fastvit.attention_maps(made, images())


def test_transformers_stay_fused_and_show_a_classifiers_maps(monkeypatch):
    config = transformers.ViTConfig(**SIZES)
    model, x, eager = randomize(transformers.ViTForImageClassification(config)).eval(), images(), []
    wanted = transformers_softmax(model, x)
    fastvit.accelerate(model)
    with torch.no_grad():
        before = model(x).logits
    linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: eager.append(self) or linear(self, x))
    found = fastvit.attention_maps(model, x, queries=[0, 4])
    assert eager == [model.classifier]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want[:, :, [0, 4]])
    with torch.no_grad():
        assert torch.equal(model(x).logits, before)


def test_one_tower_of_several():
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES)
    clip = randomize(transformers.CLIPModel(config)).eval()
    with pytest.raises(ValueError, match=r"text_model\.encoder\.layers, vision_model\.encoder\.layers"):
        fastvit.attention_maps(clip, images())
    found = fastvit.attention_maps(clip.vision_model, images(), layers=[-1])
    assert [one.shape for one in found] == [(2, 3, 1, 17)]


def torchvision_model():
    vit = torchvision.models.vision_transformer.VisionTransformer
    return randomize(vit(32, 8, 3, 3, 48, 64, num_classes=5)).eval()


def torchvision_softmax(model, x):
    """Each attention asked for its weights by itself, on what it got in the model."""
    model, found = fastvit.restore(copy.deepcopy(model)), []

    def ask(module, args, output):
        forward = nn.MultiheadAttention.forward
        found.append(forward(module, *args, need_weights=True, average_attn_weights=False)[1])

    for block in model.encoder.layers:
        block.self_attention.register_forward_hook(ask)
    with torch.no_grad():
        model(x)
    return found


@DTYPES
@ACCELERATED
def test_torchvision(accelerated, dtype):
    model = torchvision_model()
    check("torchvision", model, torchvision_softmax, images(), dtype, accelerated)
    patch, row = (fastvit.attention_maps(model, images(), 1, q)[0] for q in ([(1, 3)], 8))
    assert torch.equal(patch, row)
    assert fastvit.attention_maps(model, images(), heads="mean")[0].shape == (2, 1, 1, 17)
