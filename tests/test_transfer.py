"""The paper's start of fine-tuning (section 3.2): the whole pre-trained head goes, a layer of zeros comes."""

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from models import SMALL, images, randomize
from torch import nn

import fastvit

PRETRAINED = {**SMALL, "representation_size": 20}


def starts_at_zero(model, classes):
    """Every logit is exactly 0, the loss ln K, and the head alone learns in the first step."""
    assert not isinstance(model.head, nn.Identity)
    for training in (True, False):
        logits = model.train(training)(images())
        assert torch.equal(logits, torch.zeros(2, classes))
    loss = F.cross_entropy(logits, torch.tensor([0, classes - 1]))
    assert loss.item() == pytest.approx(math.log(classes), abs=1e-6)
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"head.weight", "head.bias"}


def test_the_whole_head_is_replaced_by_zeros():
    model = randomize(fastvit.VisionTransformer(**PRETRAINED))
    body = {name: p.clone() for name, p in model.named_parameters() if not name.startswith(("head", "pre_logits"))}
    model.reset_classifier(7, zero_init=True)
    assert isinstance(model.pre_logits, nn.Identity)
    assert model.head.weight.shape == (7, 48)
    assert model.num_features == model.head_hidden_size == 48
    assert model.num_classes == 7
    assert all(torch.equal(p, body[name]) for name, p in model.named_parameters() if not name.startswith("head"))
    assert model.state_dict().keys() == {*body, "head.weight", "head.bias"}
    starts_at_zero(model, 7)


def test_timms_call_keeps_the_representation():
    model = randomize(fastvit.VisionTransformer(**PRETRAINED)).eval()
    model.reset_classifier(7, "avg")
    assert model.head.weight.shape == (7, 20)
    assert model.head.weight.abs().max() > 0
    assert model.global_pool == "avg"
    model.reset_classifier(0, "token", zero_init=True)
    assert isinstance(model.head, nn.Identity)
    assert model(images()).shape == (2, 48)
    with pytest.raises(ValueError, match="global_pool 'mean' does not fit this model"):
        model.reset_classifier(3, "mean", zero_init=True)
    model = fastvit.VisionTransformer(**PRETRAINED, dtype=torch.bfloat16).eval()
    model.reset_classifier(3, zero_init=True)
    assert (model.head.weight.dtype, model.head.training) == (torch.bfloat16, False)


@pytest.mark.parametrize("classes", [5, 11])
@pytest.mark.parametrize("representation", [None, 20], ids=["head", "pre_logits"])
def test_a_checkpoints_head_is_left_out(classes, representation, tmp_path, monkeypatch):
    """Also where it is for as many classes."""
    monkeypatch.setitem(fastvit.config.PRESETS, "tiny", fastvit.ViTConfig(**SMALL))
    source = randomize(fastvit.VisionTransformer(**SMALL, representation_size=representation))
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    options = {} if classes == 11 else {"num_classes": classes}
    model = fastvit.create_model("tiny", checkpoint=path, weight_init="zero_head", **options)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    starts_at_zero(model, classes)
    kept = fastvit.create_model("tiny", checkpoint=path, num_classes=11, representation_size=representation)
    assert torch.equal(kept.head.weight, source.head.weight)


def test_an_original_file_with_pre_logits(tmp_path, monkeypatch):
    numpy, jax_vit = pytest.importorskip("numpy"), pytest.importorskip("jax_vit")
    monkeypatch.setitem(fastvit.config.PRESETS, "tiny", fastvit.ViTConfig(**{**SMALL, "depth": 2, "mlp_ratio": 2.0}))
    arrays = jax_vit.weights(classes=31, representation=20)
    numpy.savez(tmp_path / "a.npz", **arrays)
    model = fastvit.create_model("tiny", checkpoint=tmp_path / "a.npz", num_classes=6, weight_init="zero_head")
    assert torch.equal(model.norm.bias, torch.from_numpy(arrays["Transformer/encoder_norm/bias"]))
    starts_at_zero(model, 6)
