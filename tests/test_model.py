"""VisionTransformer against timm: keys, logits, intermediates, options; parameters and GMACs against the oracles."""

import copy
import pickle

import pytest
import torch
from harness import places
from models import SMALL, images, randomize, small_timm, timm, timm_model
from tolerances import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fastvit

# name -> (timm's options, ours): one of each layout a state_dict can have
LAYOUTS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {},
    "vit_base_patch16_224": {},
    "vit_base_patch32_384": {},
    "vit_tiny_patch16_224 registers": {"reg_tokens": 4, "no_embed_class": True},
    "vit_tiny_patch16_224 avg": {"global_pool": "avg", "fc_norm": True},
    "vit_tiny_patch16_224 LayerScale": {"init_values": 1e-5},
    "vit_tiny_patch16_224 no class token": {"class_token": False, "global_pool": "avg"},
}

# every option that changes what is computed in eval mode, alone or with its companions
OPTIONS = [
    {"global_pool": "avg"},
    {"global_pool": "max", "fc_norm": False},
    {"global_pool": "avgmax", "class_token": False},
    {"global_pool": "", "num_classes": 0},
    {"qkv_bias": False, "proj_bias": False},
    {"qk_norm": True},
    {"init_values": 0.1},
    {"reg_tokens": 3},
    {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "pool_include_prefix": True},
    {"pre_norm": True, "final_norm": False},
    {"class_token": False, "global_pool": "avg", "reg_tokens": 4},
    {"dynamic_img_size": True},
    {"pos_embed": "none", "in_chans": 5},
    {"patch_size": (8, 4), "img_size": (32, 24), "mlp_ratio": 2.5},
    {"img_size": 35},
]


def pair(**options):
    """(timm's model, ours) with the same weights."""
    theirs = small_timm(**options)
    ours = fastvit.VisionTransformer(**{**SMALL, **options}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def image_for(options):
    size = options.get("img_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, options.get("in_chans", 3), height, width)


@torch.no_grad()
def assert_same(theirs, ours, x, call=lambda model, x: model(x)):
    eager, got = call(theirs, x), call(ours, x)
    exact = call(copy.deepcopy(theirs).double(), x.double())
    for i, triple in enumerate(zip(*map(flat, (got, exact, eager)), strict=True)):
        assert_close(f"output {i}", *triple)


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in flat(v)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_round_trip(layout):
    name, options = layout.split()[0], LAYOUTS[layout]
    theirs = timm_model(name, **options)
    ours = fastvit.create_model(name, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = timm.create_model(name, **options)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in back.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])
    assert_same(theirs, ours, images(1, ours.config.img_size))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    theirs, ours = pair(**options)
    assert_same(theirs, ours, image_for(options))
    assert_same(theirs, ours, image_for(options), lambda m, x: m.forward_features(x))
    assert_same(theirs, ours, image_for(options), lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "pre_norm": True},
        {"mean": 0.1, "in_chans": 1, "dynamic_img_size": True, "reg_tokens": 2},
    ],
)
def test_a_decoded_image_goes_straight_into_the_model(options):
    shape = {name: value for name, value in options.items() if name not in ("mean", "std")}
    theirs = small_timm(**shape)
    ours = fastvit.VisionTransformer(**{**SMALL, **options}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    channels = options.get("in_chans", 3)
    pixels = torch.randint(0, 256, (2, 32, 32, channels), dtype=torch.uint8).permute(
        0, 3, 1, 2
    )  # as decoders leave them
    mean, std = (torch.tensor(options.get(name, 0.5)).double().expand(channels) for name in ("mean", "std"))
    image = (pixels.double() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    exact = copy.deepcopy(theirs).double()(image)
    assert_close("logits", ours(pixels), exact, theirs(image.float()))


@pytest.mark.parametrize("place", places("attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_runs_the_whole_model(place, dtype):
    theirs, ours = (m.to(dtype) for m in pair(init_values=0.1, reg_tokens=1))
    x = image_for({}).to(dtype)
    exact = copy.deepcopy(theirs).double()
    leaves = [ours.to(place.device), theirs, exact]
    dy = torch.randn(2, 11).to(dtype)
    outputs = []
    for model, image in zip(leaves, (x.to(place.device), x, x.double()), strict=True):
        with fastvit.backend(place.backend):
            y = model(image)
            (y * dy.to(y)).sum().backward()
        outputs.append(y.detach())
    assert_close("logits", outputs[0], outputs[2], outputs[1])
    for (name, got), base, want in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        assert_close(name, got.grad, want.grad, base.grad, gradient=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options):
    theirs, ours = pair(**options)
    exact = copy.deepcopy(theirs).double()
    x = image_for(options)
    dy = torch.randn(theirs(x).shape)
    for model, image in ((theirs, x), (ours, x), (exact, x.double())):
        model.train()
        (model(image) * dy.to(image.dtype)).sum().backward()
    for (name, got), want, base in zip(ours.named_parameters(), exact.parameters(), theirs.parameters(), strict=True):
        if base.grad is None:
            assert got.grad is None
        else:
            assert_close(name, got.grad, want.grad, base.grad, gradient=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2, "norm": True},
        {"indices": [0, 2], "return_prefix_tokens": True},
        {"indices": [-1], "output_fmt": "NLC", "intermediates_only": True, "stop_early": True},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"output_dict": True, "return_prefix_tokens": True},
    ],
    ids=str,
)
def test_intermediates(options):
    theirs, ours = pair(reg_tokens=2)
    assert_same(theirs, ours, image_for({}), lambda m, x: m.forward_intermediates(x, **options))


def test_masks_and_causal():
    theirs, ours = pair()
    mask = torch.rand(2, 1, 17, 17) > 0.4
    mask[..., 0] = True
    assert_same(theirs, ours, image_for({}), lambda m, x: m(x, attn_mask=mask))
    assert_same(theirs, ours, image_for({}), lambda m, x: m(x, is_causal=True))
    assert_same(theirs, ours, image_for({}), lambda m, x: m.forward_features(x, attn_mask=mask))


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True, "reg_tokens": 1}], ids=str)
def test_dynamic_size_and_set_input_size(options):
    theirs, ours = pair(dynamic_img_size=True, **options)
    assert_same(theirs, ours, torch.randn(2, 3, 48, 24))
    theirs, ours = pair(**options)
    for model in (theirs, ours):
        model.set_input_size(img_size=(48, 40))
    assert_same(theirs, ours, torch.randn(2, 3, 48, 40))
    for model in (theirs, ours):
        model.set_input_size(img_size=(48, 40), patch_size=(4, 4))
    assert torch.allclose(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight, atol=1e-5)
    ours.load_state_dict(theirs.state_dict())
    assert_same(theirs, ours, torch.randn(2, 3, 48, 40))


def test_positions_of_equal_count_and_other_shape_are_resized():
    model = fastvit.VisionTransformer(**{**SMALL, "img_size": (16, 64)})
    before = model.pos_embed.detach().clone()
    model.set_input_size((32, 32))
    assert model.pos_embed.shape == before.shape
    assert not torch.allclose(model.pos_embed, before)


def test_reset_classifier_and_helpers():
    theirs, ours = pair()
    for model in (theirs, ours):
        model.reset_classifier(5, "avg")
    ours.head.load_state_dict(theirs.head.state_dict())
    assert_same(theirs, ours, image_for({}))
    ours.reset_classifier(0)
    assert isinstance(ours.get_classifier(), torch.nn.Identity)
    assert ours.no_weight_decay() <= theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.feature_info == theirs.feature_info


def test_gradient_checkpointing_changes_nothing():
    model = randomize(fastvit.VisionTransformer(**SMALL)).train()
    x = image_for({})

    def grads():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = grads()
    model.set_grad_checkpointing()
    for got, expected in zip(grads(), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "rate", ["drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"]
)
def test_every_rate_acts_in_training_only(rate):
    model = randomize(fastvit.VisionTransformer(**SMALL, **{rate: 0.5}))
    x = image_for({})
    model.eval()
    plain = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    assert torch.equal(model(x), plain(x))
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}, {"proj_drop_rate": 0.1}], ids=str)
def test_a_dropped_branch_adds_nothing(options):
    block = randomize(fastvit.VisionTransformer(**SMALL, **options, drop_path_rate=0.5)).blocks[2].train()
    x = torch.randn(4, 17, 48)
    block.drop_path1.drop_prob = 1 - 1e-7
    attention_dropped = block(x)
    assert not torch.equal(attention_dropped, x)
    block.drop_path2.drop_prob = 1 - 1e-7
    assert torch.equal(block(x), x)


def test_drop_path_rates_grow_with_depth():
    theirs = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3)
    ours = fastvit.create_model("vit_tiny_patch16_224", drop_path_rate=0.3)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in ours.blocks]
    assert rates == pytest.approx([getattr(b.drop_path1, "drop_prob", 0.0) for b in theirs.blocks])


@pytest.mark.parametrize("scheme", ["", "jax", "jax_nlhb", "moco"])
def test_initial_weights_are_distributed_as_timms(scheme):
    theirs = timm.create_model("vit_tiny_patch16_224", weight_init=scheme)
    ours = fastvit.create_model("vit_tiny_patch16_224", weight_init=scheme)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.1, abs=2e-7) or a.numel() < 2000, name
        assert a.mean().item() == pytest.approx(b.mean().item(), abs=4 * b.std().item() / a.numel() ** 0.5 + 1e-6)


def test_zero_head_and_representation():
    model = fastvit.create_model("vit_tiny_patch16_224", weight_init="zero_head", num_classes=7)
    assert torch.equal(model(images(1, 224)), torch.zeros(1, 7))
    model = fastvit.VisionTransformer(**SMALL, representation_size=20)
    assert model.pre_logits.fc.weight.shape == (20, 48)
    assert model.head.weight.shape == (11, 20)
    features = model.eval().forward_head(model.forward_features(image_for({})), pre_logits=True)
    assert features.shape == (2, 20)
    assert features.abs().max() < 1


def test_device_and_dtype():
    model = fastvit.VisionTransformer(**SMALL, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    meta = fastvit.create_model("vit_giant_patch14_224", device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch32_224": 88_224_232,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "vit_large_patch16_224": 304_326_632,
    "vit_large_patch32_224": 306_535_400,
    "vit_huge_patch14_224": 632_045_800,
}
GMACS = {
    "vit_tiny_patch16_224": 1.254,
    "vit_small_patch16_224": 4.599,
    "vit_base_patch32_224": 4.409,
    "vit_base_patch16_224": 17.564,
    "vit_base_patch16_384": 55.484,
    "vit_large_patch16_224": 61.555,
    "vit_large_patch32_224": 15.378,
    "vit_huge_patch14_224": 167.295,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_oracles(name):
    model = fastvit.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    image = torch.empty(1, 3, model.config.img_size, model.config.img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), fastvit.backend("reference"):
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name], abs=6e-4)


def test_every_preset_exists_in_timm_or_is_of_the_family():
    names = fastvit.list_models()
    assert names == sorted(names)
    known = set(timm.list_models("vit_*"))
    for name in names:
        if name in known:
            want = timm.create_model(name, device="meta", num_classes=10).state_dict()
            got = fastvit.create_model(name, device="meta", num_classes=10).state_dict()
            assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    for size in ("tiny", "small", "base", "large", "huge", "giant", "gigantic"):
        for patch, side in ((8, 224), (14, 224), (14, 518), (16, 224), (16, 384), (32, 384)):
            assert f"vit_{size}_patch{patch}_{side}" in names
    for name in ("vit_giant_patch14_224", "vit_gigantic_patch14_224"):
        ours = fastvit.create_model(name, device="meta")
        theirs = timm.create_model(name, device="meta", num_classes=1000)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_copies_and_pickles():
    model = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    x = image_for({})
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_empty_batch():
    model = fastvit.VisionTransformer(**SMALL)
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 11)


def test_hooks_inside_a_block_fire():
    model = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    x = image_for({})
    want, seen = model(x), []
    handle = model.blocks[1].attn.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(model(x), want, atol=1e-4)
    assert seen == [1]
    handle.remove()
    model(x)
    assert seen == [1]


ViT = fastvit.VisionTransformer


def small(*shape):
    return ViT(**SMALL)(torch.zeros(*shape))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (
            ValueError,
            "unknown model 'vit_bas_patch16_224'.* vit_base",
            lambda: fastvit.create_model("vit_bas_patch16_224"),
        ),
        (TypeError, "unknown model option 'embed_dims'; expected one of embed_dim", lambda: ViT(embed_dims=3)),
        (ValueError, "num_heads must be a divisor", lambda: ViT(embed_dim=50, num_heads=3)),
        (ValueError, "global_pool must be one of", lambda: ViT(global_pool="mean")),
        (ValueError, "needs class_token=True", lambda: ViT(class_token=False)),
        (ValueError, r"drop_rate must be in \[0, 1\)", lambda: ViT(drop_rate=1.0)),
        (ValueError, "img_size must be a positive integer or a pair", lambda: ViT(img_size=-1)),
        (ValueError, "must hold at least one patch", lambda: ViT(img_size=8, patch_size=16)),
        (ValueError, r"image size \(24, 32\) does not match", lambda: small(1, 3, 24, 32)),
        (ValueError, "image must be", lambda: small(3, 32, 32)),
        (ValueError, "image must be", lambda: small(1, 4, 32, 32)),
        (ValueError, "weight_init must be one of", lambda: ViT(weight_init="xavier")),
        (ValueError, "mean must be a number or 3", lambda: ViT(mean="abc")),
        (ValueError, "std must be positive", lambda: ViT(std=0)),
        (ValueError, "indices must be in", lambda: ViT(**SMALL).forward_intermediates(torch.zeros(1, 3, 32, 32), [7])),
    ],
)
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
