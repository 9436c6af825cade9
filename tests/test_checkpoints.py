"""Weights from library to library: logits stay, files round-trip, positions are resized as the source does it."""

import copy

import pytest
import safetensors.torch
import torch
from checkpoint_models import (
    CLIP,
    HF,
    REGISTERS,
    TIMM,
    VT,
    Tokens,
    clip_with_head,
    distilled,
    hf,
    inner,
    ours,
    output,
    save_hf,
    timm_vit,
    transformers,
    tv_vit,
    vit_hf,
    with_gate,
    write,
)
from models import images, randomize, timm
from tolerances import assert_close
from torch import nn

import fastvit
from fastvit import CheckpointError, convert_state_dict, load_checkpoint

# family -> models that compute the same function of the same weights, one for each library
FAMILIES = {
    "ViT": (timm_vit, ours, vit_hf, tv_vit),
    "ViT without qkv bias": (
        lambda: timm_vit(qkv_bias=False),
        lambda: ours(qkv_bias=False),
        lambda: vit_hf(qkv_bias=False),
    ),
    "ViT without head": (
        lambda: timm_vit(num_classes=0),
        lambda: ours(num_classes=0),
        lambda: Tokens(transformers.ViTModel, add_pooling_layer=False),
    ),
    "pre_logits": (
        lambda: ours(representation_size=20),
        lambda: tv_vit(representation_size=20),
    ),
    "DeiT": (distilled, lambda: hf("DeiTForImageClassificationWithTeacher", num_labels=5)),
    "DINOv2": (
        lambda: timm_vit(init_values=0.1, num_classes=0),
        lambda: ours(init_values=0.1, num_classes=0),
        lambda: hf("Dinov2Model"),
    ),
    "DINOv2 with registers": (
        lambda: timm_vit(**REGISTERS),
        lambda: ours(**REGISTERS),
        lambda: hf("Dinov2WithRegistersModel"),
    ),
    "DINOv2 with a gate": (
        with_gate,
        lambda: hf("Dinov2Model", use_swiglu_ffn=True),
    ),
    "CLIP": (
        clip_with_head,
        lambda: ours(pre_norm=True, norm_eps=1e-5, num_classes=20),
        lambda: hf("CLIPVisionModelWithProjection", projection_dim=20, layer_norm_eps=1e-5),
    ),
    "CLIP without projection": (
        lambda: timm_vit(num_classes=0, **CLIP),
        lambda: hf("CLIPVisionModel", layer_norm_eps=1e-5),
    ),
    "SigLIP": (
        lambda: timm_vit(class_token=False, global_pool="map", num_classes=0),
        lambda: hf("SiglipVisionModel"),
    ),
}


PAIRS = [
    pytest.param(FAMILIES[name][i], FAMILIES[name][j], id=f"{name} {i}-{j}")
    for name in FAMILIES
    for i in range(len(FAMILIES[name]))
    for j in range(len(FAMILIES[name]))
]


@pytest.mark.parametrize(("make_source", "make_target"), PAIRS)
def test_logits_stay(make_source, make_target, tmp_path):
    source, target = make_source(), randomize(make_target(), seed=6)
    before = output(target, images())
    if isinstance(source, fastvit.VisionTransformer) and source.config.pre_norm:
        nn.init.zeros_(source.head.bias)
    assert load_checkpoint(inner(target), write(source, tmp_path)) is inner(target)
    x = images()
    exact = output(copy.deepcopy(source).double(), x.double())
    assert_close("logits", output(target, x), exact, output(source, x))
    assert (before - exact).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_converted_there_and_back(name):
    first = FAMILIES[name][0]().state_dict()
    targets = [*([] if name == "pre_logits" else ["hf", "transformers_on_disk"])]
    for dst in (*targets, *(["torchvision"] if name in ("ViT", "pre_logits") else [])):
        other = convert_state_dict(first, dst=dst)
        assert not other.keys() & first.keys()
        back = convert_state_dict(other)
        assert back.keys() == first.keys()
        assert all(torch.equal(back[key], first[key]) for key in first)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "DINOv2", "DINOv2 with registers", "DINOv2 with a gate"])
def test_names_are_those_of_transformers_in_memory_and_on_disk(name, tmp_path):
    model = FAMILIES[name][-1 - (name == "ViT")]()
    save_hf(model, tmp_path)
    disk = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in key for key in disk)
    hub, unused = convert_state_dict(model.state_dict()), {"embeddings.mask_token"}
    assert convert_state_dict(hub, dst="hf").keys() == model.state_dict().keys() - unused
    assert convert_state_dict(hub, dst="transformers_on_disk").keys() == disk.keys() - unused
    found = convert_state_dict(disk)
    assert all(torch.equal(found[key], hub[key]) for key in hub)


@pytest.mark.parametrize("gated", [False, True])
def test_original_dinov2(gated):
    """facebookresearch/dinov2 has timm's names but for registers, the gate and the mask token."""
    options = {**REGISTERS, "no_embed_class": True}
    source = timm_vit(**options) if not gated else with_gate()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    original = {"mask_token": torch.zeros(1, 48)}
    for name, tensor in state.items():
        name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if gated else name
        original[name.replace("reg_token", "register_tokens")] = tensor
    if not gated:
        position = torch.randn(1, 1, 48)
        original["pos_embed"] = torch.cat([position, original["pos_embed"]], 1)
        original["cls_token"] = original["cls_token"] - position
    expected = timm.models.vision_transformer.checkpoint_filter_fn(dict(original), source)
    got = convert_state_dict(original)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert torch.allclose(got["cls_token"], state["cls_token"], atol=1e-6)


def openai_names(state):
    found = {}
    for name, tensor in state.items():
        part = name
        for old, new in (
            ("blocks.", "transformer.resblocks."),
            ("patch_embed.proj", "conv1"),
            ("norm_pre", "ln_pre"),
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("attn.qkv.", "attn.in_proj_"),
            ("attn.proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            part = part.replace(old, new)
        found[f"visual.{part}"] = tensor
    for leaf in ("weight", "bias"):
        found[f"visual.ln_post.{leaf}"] = found.pop(f"visual.norm.{leaf}")
    found["visual.class_embedding"] = state["cls_token"].flatten()
    found["visual.positional_embedding"] = state["pos_embed"][0]
    found["visual.proj"] = state["head.weight"].t()
    for name in ("cls_token", "pos_embed", "head.weight", "head.bias"):
        del found[f"visual.{name}"]
    text = ("transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "positional_embedding", "logit_scale")
    return {**found, **{name: torch.ones(3) for name in text}}


def test_openai_clip():
    source = clip_with_head()
    state = openai_names(source.state_dict())
    expected = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), source)
    got = convert_state_dict(state)
    assert got.keys() == source.state_dict().keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_open_clips_timm_tower():
    source = clip_with_head()
    state = {f"visual.trunk.{k}": v for k, v in source.state_dict().items() if not k.startswith("head")}
    state |= {"visual.head.proj.weight": source.head.weight, "text.token_embedding.weight": torch.ones(3)}
    got = convert_state_dict(state)
    assert all(torch.equal(got[name], value) for name, value in source.state_dict().items())


def test_an_encoder_comes_out_of_mae(tmp_path):
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    source = hf("ViTMAEForPreTraining", decoder_intermediate_size=32, mask_ratio=0.0, **decoder)
    target = load_checkpoint(timm_vit(num_classes=0), write(source, tmp_path))
    order = torch.arange(16.0)[None].expand(2, -1)  # MAE shuffles patches by their noise
    want = source.vit(images(), noise=order).last_hidden_state[:, 0]
    assert torch.allclose(output(target, images()), want, atol=1e-5)
    original = {**target.state_dict(), "mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
    safetensors.torch.save_file(original, tmp_path / "a.safetensors")
    larger = load_checkpoint(ours(num_classes=0, img_size=48), tmp_path / "a.safetensors")
    want = timm.layers.resample_abs_pos_embed(target.pos_embed, (6, 6))
    assert torch.equal(larger.pos_embed, want)


def test_a_tower_comes_out_of_a_whole_clip(tmp_path):
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(vision_config={**HF, "layer_norm_eps": 1e-5}, text_config=text, projection_dim=20)
    source = randomize(transformers.CLIPModel(config)).eval()
    save_hf(source, tmp_path)
    target = load_checkpoint(clip_with_head(), tmp_path)
    x = images()
    want = source.visual_projection(source.vision_model(x).pooler_output)
    assert torch.allclose(output(target, x), want, atol=1e-5)
    assert not torch.equal(source.logit_scale, torch.zeros(()))
    again = randomize(transformers.CLIPModel(config), seed=2)  # equal names and shapes: the text comes along
    assert torch.equal(load_checkpoint(again, tmp_path).logit_scale, source.logit_scale)


def test_heads(tmp_path):
    path = write(timm_vit(), tmp_path)
    model = ours(num_classes=9)
    head = model.head.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"head.weight \(5, 48\) instead of \(9, 48\).*drop_head=True"):
        load_checkpoint(model, path)
    assert torch.equal(load_checkpoint(model, path, drop_head=True).head.weight, head)
    assert torch.equal(model.norm.weight, timm_vit().norm.weight)
    assert load_checkpoint(ours(num_classes=0), path, drop_head=True) is not None
    with pytest.raises(CheckpointError, match=r"2 unexpected: head\.bias, head\.weight|head\.weight, head\.bias"):
        load_checkpoint(ours(num_classes=0), path)
    equal = ours()
    assert torch.equal(load_checkpoint(equal, path, drop_head=True).head.weight, timm_vit().head.weight)
    (tmp_path / "none").mkdir()
    headless = write(timm_vit(num_classes=0), tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"2 missing: head\.weight, head\.bias"):
        load_checkpoint(ours(), headless)
    load_checkpoint(vit_hf(), headless, drop_head=True)
    below = {("" if n.startswith("head") else "backbone.") + n: t for n, t in timm_vit().state_dict().items()}
    safetensors.torch.save_file(below, tmp_path / "below.safetensors")  # a trainer's, with the head beside the backbone
    kept = ours(num_classes=5).head.weight
    assert torch.equal(load_checkpoint(ours(), tmp_path / "below.safetensors", drop_head=True).head.weight, kept)


def test_create_model(tmp_path):
    options = {**TIMM, "embed_dim": 192, "drop_rate": 0.0}
    del options["img_size"], options["patch_size"]
    source = randomize(VT(img_size=32, patch_size=16, **{**options, "num_classes": 1000}))
    path = write(source, tmp_path)
    small = {**options, "img_size": 32}
    model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **small)
    assert torch.equal(model.head.weight, source.head.weight)
    fresh = fastvit.create_model("vit_tiny_patch16_224", path, num_classes=3, **small)
    assert fresh.head.weight.shape == (3, 192)
    assert torch.equal(fresh.norm.weight, source.norm.weight)
    larger = fastvit.create_model("vit_tiny_patch16_224", path, **{**small, "img_size": 64})
    assert larger.pos_embed.shape == (1, 17, 192)
    with pytest.raises(ValueError, match="of another shape"):
        fastvit.create_model("vit_tiny_patch16_224", path, **{**small, "mlp_ratio": 3.0})
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        fastvit.create_model("vit_tiny_patch16_224", tmp_path / "vit.pth", **small)
    pickled = fastvit.create_model("vit_tiny_patch16_224", tmp_path / "vit.pth", weights_only=True, **small)
    assert torch.equal(pickled.head.weight, source.head.weight)
    with pytest.raises(FileNotFoundError, match=r"google/vit-base-patch16-224: no such file .* nothing is downloaded"):
        fastvit.create_model("vit_tiny_patch16_224", "google/vit-base-patch16-224")


def test_not_strict_loads_what_is_there_and_says_the_rest(tmp_path):
    state = dict(timm_vit().state_dict())
    state["strange"] = state.pop("norm.bias")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    model = ours()
    before = model.norm.bias.detach().clone()
    with pytest.warns(UserWarning, match=r"1 missing: norm\.bias; 1 unexpected: strange"):
        load_checkpoint(model, tmp_path / "a.safetensors", strict=False)
    assert torch.equal(model.norm.bias, before)
    assert torch.equal(model.norm.weight, state["norm.weight"])
    safetensors.torch.save_file({"patch_embed.proj.weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_checkpoint(model, tmp_path / "b.safetensors", strict=False)


def test_an_accelerated_model_and_a_model_of_another_dtype_load(tmp_path):
    source = timm_vit()
    path = write(source, tmp_path)
    target = fastvit.accelerate(randomize(VT(**{**TIMM, "num_classes": 5}), seed=7).eval())
    output(target, images())  # weights may have been packed by now
    load_checkpoint(target, path)
    assert torch.allclose(output(target, images()), output(source, images()), atol=1e-4)
    half = load_checkpoint(ours().bfloat16(), path)
    assert torch.equal(half.head.weight, source.head.weight.bfloat16())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_loads(wrap, tmp_path):
    source, target = timm_vit(), vit_hf()
    wrapped = wrap(target)
    safetensors.torch.save_file(wrap(source).state_dict(), tmp_path / "a.safetensors")
    assert load_checkpoint(wrapped, tmp_path / "a.safetensors") is wrapped
    assert torch.allclose(output(target, images()), output(source, images()), atol=1e-5)


def test_what_has_no_place_is_refused():
    for options, words in (
        ({"qk_norm": True}, "q_norm"),
        ({"global_pool": "avg"}, "fc_norm"),
        ({"init_values": 0.1}, "ls1.gamma"),
    ):
        state = timm_vit(**options).state_dict()
        with pytest.raises(CheckpointError, match=f"torchvision has no place for .*{words}"):
            convert_state_dict(state, dst="torchvision")
    with pytest.raises(CheckpointError, match=r"Looked for .*projection.*Found a, b"):
        convert_state_dict({"a": torch.ones(1), "b": torch.ones(1)})
    rotary = timm.create_model("vit_small_patch16_dinov3", depth=1, num_classes=0).state_dict()
    with pytest.raises(CheckpointError, match="DINOv2 has no model without a table of positions"):
        convert_state_dict(rotary, dst="hf")
    with pytest.raises(CheckpointError, match="Looked for torchvision"):
        convert_state_dict(timm_vit().state_dict(), src="torchvision")
    state = dict(vit_hf().state_dict())
    del state["vit.layers.1.attention.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.k_proj\.weight' is missing beside"):
        convert_state_dict(state)
    with pytest.raises(CheckpointError, match="several vision transformers"):
        convert_state_dict({f"{tower}.{k}": v for tower in "ab" for k, v in timm_vit().state_dict().items()})
