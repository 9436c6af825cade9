"""The original .npz: the model of the JAX code, written again in fp64, is what loaded models must compute."""

import functools
import types

import jax_vit
import numpy
import pytest
import torch
import torch.nn.functional as F
from checkpoint_models import TIMM, VT, hf, output, timm_vit
from models import images, randomize, timm
from scipy import ndimage
from tolerances import assert_close
from torch import nn

import fastvit
from fastvit import CheckpointError, load_checkpoint

TANH = functools.partial(nn.GELU, approximate="tanh")


def ours(**options):
    options = {**TIMM, "num_classes": 7, "act_layer": "gelu_tanh", **options}
    return randomize(fastvit.VisionTransformer(**options), seed=8).eval()


def saved(tmp_path, arrays, prefix=""):
    path = tmp_path / "vit.npz"
    numpy.savez(path, **{prefix + name: array for name, array in arrays.items()})
    return path


def assert_original(model, arrays, **options):
    x = images(2, 32)
    exact, eager = (jax_vit.logits(arrays, x.to(dtype), **options) for dtype in (torch.float64, torch.float32))
    assert_close("logits", output(model, x), exact, eager)


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_vit(prefix, tmp_path):
    arrays = jax_vit.weights()
    path = saved(tmp_path, arrays, prefix)
    assert_original(load_checkpoint(ours(), path), arrays)
    assert_original(load_checkpoint(timm_vit(num_classes=7, act_layer=TANH), path), arrays)
    assert_original(
        load_checkpoint(hf("ViTForImageClassification", num_labels=7, hidden_act="gelu_pytorch_tanh"), path), arrays
    )


def test_pre_logits_of_imagenet_21k(tmp_path):
    arrays = jax_vit.weights(classes=31, representation=20)
    path = saved(tmp_path, arrays)
    assert_original(load_checkpoint(ours(num_classes=31, representation_size=20), path), arrays)
    with pytest.raises(CheckpointError, match=r"unexpected: pre_logits/kernel.*drop_head=True"):
        load_checkpoint(ours(num_classes=31), path)
    model = ours(num_classes=31)
    head = model.head.weight.clone()
    load_checkpoint(model, path, drop_head=True)
    assert torch.equal(model.head.weight, head)  # what follows pre_logits makes no sense without it
    without = {name: array for name, array in arrays.items() if not name.startswith(("pre_logits", "head"))}
    model.reset_classifier(0)
    assert_original(model, without)


def test_the_same_weights_as_timm_reads(tmp_path):
    arrays = jax_vit.weights(classes=7)
    path = saved(tmp_path, arrays)
    theirs = timm_vit(num_classes=7)
    theirs.load_pretrained(str(path))
    state = load_checkpoint(ours(), path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("scanned", [False, True], ids=["blocks", "scanned"])
def test_big_vision_with_a_pooling_head(scanned, tmp_path):
    arrays = jax_vit.weights(order="big_vision", classes=0)
    rng = numpy.random.default_rng(1)
    arrays["pos_embedding"] = arrays.pop("Transformer/posembed_input/pos_embedding")[:, 1:]
    del arrays["cls"]
    arrays |= {"MAPHead_0/probe": jax_vit.draw(rng, 1, 1, 48), **jax_vit.norm_weights(rng, "MAPHead_0/LayerNorm_0", 48)}
    arrays |= jax_vit.attention_weights(rng, "MAPHead_0/MultiHeadDotProductAttention_0", 48, 3)
    arrays |= jax_vit.dense(rng, "MAPHead_0/MlpBlock_0/Dense_0", 48, 96)
    arrays |= jax_vit.dense(rng, "MAPHead_0/MlpBlock_0/Dense_1", 96, 48)
    if scanned:
        first = "Transformer/encoderblock_0/"
        for name in [name.removeprefix(first) for name in arrays if name.startswith(first)]:
            parts = [arrays.pop(f"Transformer/encoderblock_{i}/{name}") for i in range(2)]
            arrays[f"Transformer/encoderblock/{name}"] = numpy.stack(parts)
    path = tmp_path / "siglip.npz"
    text = {name: numpy.ones((5, 4), numpy.float32) for name in ("params/txt/Embed_0/embedding", "params/t")}
    numpy.savez(path, **{f"params/img/{name}": array for name, array in arrays.items()}, **text)
    options = {"class_token": False, "global_pool": "map", "num_classes": 0}
    theirs = timm_vit(**options)
    theirs.load_pretrained(str(path))
    state = load_checkpoint(randomize(VT(**{**TIMM, **options}), seed=5), path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    tower = load_checkpoint(hf("SiglipVisionModel"), path)
    assert torch.allclose(output(tower, images()), output(theirs, images()), atol=1e-5)


def hybrid(layers, patch, **options):
    """timm's hybrid with a ResNet of these units, made to compute what the JAX code does."""
    hybrids = timm.models.vision_transformer_hybrid
    backbone = hybrids._resnetv2(layers)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 7}
    model = hybrids._create_vision_transformer_hybrid(
        "vit_base_r50_s16_224", backbone, patch_size=patch, act_layer=TANH, **{**size, **options}
    )
    return randomize(model).eval()


def as_jax(model):
    """Standardise weights by std + 1e-5 and norm groups with eps 1e-6, where timm has the variance + 1e-8 and 1e-5."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), unbiased=False, keepdim=True)
        x = F.pad(x, jax_vit.same_padding(x, self.kernel_size[0], self.stride[0]))
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), stride=self.stride)

    for module in model.modules():
        if type(module).__name__ == "StdConv2dSame":
            module.forward = types.MethodType(forward, module)
        elif isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    return model


@pytest.mark.parametrize(("layers", "patch"), [((1, 1), 1), ((2,), 2)], ids=str)
def test_hybrids(layers, patch, tmp_path):
    grid = 32 // 4 // 2 ** (len(layers) - 1) // patch
    arrays = jax_vit.weights(layers=layers, patch=patch, grid=grid)
    path = saved(tmp_path, arrays)
    model = load_checkpoint(hybrid(layers, patch), path)
    theirs = hybrid(layers, patch)
    theirs.load_pretrained(str(path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in theirs.state_dict().items())
    x = images(2, 32)
    exact = jax_vit.logits(arrays, x.double(), layers=layers)
    assert (output(model, x) - exact).abs().max() < 2e-3 * exact.abs().max()  # timm's own eps
    assert_original(as_jax(model), arrays, layers=layers)


@pytest.mark.parametrize("grid", [2, 3, 6])
def test_positions_the_original_way_are_scipys(grid, tmp_path):
    arrays = jax_vit.weights()
    model = load_checkpoint(ours(img_size=8 * grid), saved(tmp_path, arrays), interpolation="original")
    table = arrays["Transformer/posembed_input/pos_embedding"]
    zoomed = ndimage.zoom(table[0, 1:].reshape(4, 4, 48), (grid / 4, grid / 4, 1), order=1).reshape(-1, 48)
    want = numpy.concatenate([table[0, :1], zoomed])
    assert numpy.abs(model.pos_embed[0].detach().numpy() - want).max() < 1e-6


def test_positions_by_default_are_timms(tmp_path):
    path = saved(tmp_path, jax_vit.weights())
    theirs = timm_vit(num_classes=7, img_size=(24, 56))
    theirs.load_pretrained(str(path))
    assert torch.equal(load_checkpoint(ours(img_size=(24, 56)), path).pos_embed, theirs.pos_embed)


def test_bfloat16_and_fortran_order(tmp_path):
    arrays = jax_vit.weights()
    half = {
        name: torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view("V2") for name, array in arrays.items()
    }
    model = load_checkpoint(ours(), saved(tmp_path, half))
    want = load_checkpoint(ours(), saved(tmp_path, arrays)).bfloat16()
    assert all(torch.equal(v.bfloat16(), want.state_dict()[n]) for n, v in model.state_dict().items())
    numpy.savez_compressed(tmp_path / "f.npz", **{n: numpy.asfortranarray(a) for n, a in arrays.items()})
    assert_original(load_checkpoint(ours(), tmp_path / "f.npz"), arrays)


def test_what_is_missing_or_strange_is_named(tmp_path):
    arrays = jax_vit.weights()
    at = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    for change, words in (
        ({f"{at}/key/kernel": None}, f"key beside '{at}/query/kernel' is missing"),
        ({f"{at}/key/kernel": arrays[f"{at}/key/kernel"][:, :, :8]}, "must have one shape"),
        ({f"{at}/out/kernel": arrays[f"{at}/out/kernel"].reshape(48, 48)}, "out/kernel' must have 3 dimensions"),
        ({"Transformer/encoder_norm/scale": None}, "1 missing: norm.weight"),
        ({"Transformer/new/scale": arrays["embedding/bias"]}, "1 unexpected: Transformer/new/scale"),
        ({"head/bias": arrays["head/bias"][:5]}, r"head.bias \(5,\) instead of \(7,\)"),
    ):
        changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
        model = ours()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(model, saved(tmp_path, changed))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
