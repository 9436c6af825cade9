"""Hybrids against timm's and against the original's mathematics in fp64; parameters and MACs against the oracles."""

import copy
import pickle

import jax_vit
import numpy
import pytest
import torch
from models import images, randomize, timm
from tolerances import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import analysis, hybrid
from fastvit.benchmarks import cases
from fastvit.commands.models import _preset_of
from fastvit.hybrid import GroupNormAct, StdConv2d, standardised

TINY = {"embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 11}
# (bottlenecks of the stages, P, image): P positions of the feature map make a patch
STEMS = [
    ((1, 1), 1, (32, 48)),
    ((2,), 2, (40, 24)),
    ((), 4, (32, 32)),
    ((1, 1, 1), 1, (33, 51)),
    ((1, 2), 2, (47, 27)),
]


def theirs_of(layers, patch, size, **options):
    """timm's hybrid with a stem of these stages."""
    made = timm.models.vision_transformer_hybrid
    backbone = made._resnetv2(layers, in_chans=options.get("in_chans", 3))
    options = {**TINY, **options, "img_size": size, "patch_size": patch}
    return randomize(made._create_vision_transformer_hybrid("vit_base_r50_s16_224", backbone, **options)).eval()


def ours_of(layers, patch, size, **options):
    stride = 4 * 2 ** max(0, len(layers) - 1)
    options = {**TINY, **options, "img_size": size, "patch_size": stride * patch, "backbone": layers}
    return randomize(fastvit.VisionTransformer(**options)).eval()


def pair(layers=(1, 1), patch=1, size=(32, 32), **options):
    """(timm's hybrid, ours) with the same weights."""
    theirs, ours = theirs_of(layers, patch, size, **options), ours_of(layers, patch, size, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def noise(size, batch=2, channels=3):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same(theirs, ours, x, call=lambda model, x: model(x)):
    exact = call(copy.deepcopy(theirs).double(), x.double())
    assert_close("output", call(ours, x), exact, call(theirs, x))


PARAMETERS = {"vit_small_r26_s32_224": 36_431_912, "vit_base_r50_s16_384": 98_950_952}
GMACS = {"vit_small_r26_s32_224": 3.464, "vit_base_r50_s16_384": 67.156}


@pytest.mark.parametrize("name", PARAMETERS)
def test_oracles(name):
    model = fastvit.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    image = torch.empty(1, 3, model.config.img_size, model.config.img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), fastvit.backend("reference"):
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name], abs=6e-4)
    assert cases.macs(model.config) == counter.get_total_flops() // 2


def test_timms_hybrids_are_presets():
    theirs = {name for name in timm.list_models("vit_*_r*_s*") if "resnet" not in name}
    assert theirs == {name for name in fastvit.list_models() if fastvit.PRESETS[name].backbone is not None}
    for name in ("vit_tiny_r_s16_p8_384", "vit_small_r26_s32_384", "vit_base_r50_s16_224"):
        model, want = fastvit.create_model(name, device="meta"), timm.create_model(name, device="meta")
        assert model.patch_embed.grid_size == want.patch_embed.grid_size == model.config.grid_size
        assert model.feature_info == want.feature_info


@pytest.mark.parametrize(("layers", "patch", "size"), STEMS, ids=str)
def test_state_dict_round_trip(layers, patch, size):
    theirs, ours = pair(layers, patch, size)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    back = theirs_of(layers, patch, size)
    back.load_state_dict(randomize(ours, seed=1).state_dict(), strict=True)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in back.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layers", "patch", "size"), STEMS, ids=str)
def test_logits_and_every_gradient(layers, patch, size, dtype):
    theirs, ours = (model.to(dtype) for model in pair(layers, patch, size))
    x, dy = noise(size).to(dtype), noise((11, 1), channels=1).to(dtype).view(2, 11)
    assert_same(theirs, ours, x)
    exact, grads = copy.deepcopy(theirs).double(), []
    for model, image in ((ours, x), (exact, x.double()), (theirs, x)):
        leaf = image.clone().requires_grad_()
        (model.train()(leaf) * dy.to(leaf)).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in model.parameters())])
    for name, got, want, base in zip(["image", *(n for n, _ in ours.named_parameters())], *grads, strict=True):
        if dtype == torch.float32:
            assert_close(name, got, want, base, gradient=True)
        else:  # the rule of whole models: which side of a ReLU a number falls is chance, and turns both from fp64's
            assert (got.double() - want).norm() <= 2 * (base.double() - want).norm(), name


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (35, 49), (17, 92)], ids=str)
def test_any_image_size(size):
    """Of a model for another size, timm's is told first: it takes an odd size for a smaller one in its stride."""
    theirs, ours = pair(size=(40, 40), dynamic_img_size=True)
    resized = copy.deepcopy(ours)
    for model in (theirs, resized):
        model.set_input_size(img_size=size)
    assert resized.patch_embed.grid_size == theirs.patch_embed.grid_size
    assert_same(theirs, ours, noise(size))
    assert_same(theirs, resized, noise(size))


def test_another_patch_size():
    theirs, ours = pair(size=(32, 64))
    theirs.set_input_size(img_size=(64, 32), patch_size=2)
    ours.set_input_size(img_size=(64, 32), patch_size=16)
    assert ours.patch_embed.proj.weight.shape[2:] == (2, 2)
    assert torch.allclose(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight, atol=1e-5)
    ours.load_state_dict(theirs.state_dict())
    assert_same(theirs, ours, noise((64, 32)))
    with pytest.raises(ValueError, match="multiple of the backbone's stride 8"):
        ours.set_input_size(patch_size=12)
    assert ours.patch_embed.patch_size == (16, 16)


@pytest.mark.parametrize("options", [{"in_chans": 2, "mean": (0.2, 0.6), "std": (0.3, 0.1)}, {}], ids=str)
def test_a_decoded_image_goes_straight_into_the_model(options):
    channels = options.get("in_chans", 3)
    theirs = theirs_of((1,), 2, (32, 24), in_chans=channels)
    ours = ours_of((1,), 2, (32, 24), **options)
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randint(0, 256, (2, 32, 24, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(options.get(name, 0.5)).double().expand(channels) for name in ("mean", "std"))
    image = (pixels.double() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    exact = copy.deepcopy(theirs).double()(image)
    assert_close("logits", ours(pixels), exact, theirs(image.float()))
    half, exact = copy.deepcopy(ours).bfloat16(), copy.deepcopy(theirs).bfloat16().double()(image)
    assert_close("logits", half(pixels), exact, copy.deepcopy(theirs).bfloat16()(image.bfloat16()))


def original(layers, patch, size, **options):
    return ours_of(layers, patch, size, depth=2, num_classes=7, mlp_ratio=2.0, act_layer="gelu_tanh", **options)


@pytest.mark.parametrize(("layers", "patch"), [((1, 1), 1), ((2,), 2), ((), 4)], ids=str)
def test_the_originals_file_computes_what_the_original_does(layers, patch, tmp_path):
    size = patch * 4 * 2 ** max(0, len(layers) - 1) * 3
    arrays = jax_vit.weights(layers=layers, patch=patch, grid=3)
    for name in arrays:
        if "/conv" in f"/{name}" and name.endswith("kernel"):
            arrays[name] = arrays[name] * numpy.float32(1e-3)  # so narrow that what is added to the deviation matters
    numpy.savez(tmp_path / "original.npz", **arrays)
    models = {
        eps: fastvit.load_checkpoint(original(layers, patch, size, backbone_eps=eps), tmp_path / "original.npz")
        for eps in ("original", "timm")
    }
    x = 1e-2 * images(2, size)  # so dark that what is added to the variance of the first groups matters
    exact = jax_vit.logits(arrays, x.double(), layers=layers)
    assert_close("logits", models["original"](x), exact, jax_vit.logits(arrays, x, layers=layers))
    errors = {eps: (model.double()(x.double()) - exact).abs().max() for eps, model in models.items()}
    assert errors["original"] < 1e-9 < 1e-4 < errors["timm"]


def narrow_filters():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(2))
    return (weight + 0.5) * torch.tensor([1e-5, 1e-4, 1e-2, 1.0, 1.0, 30.0]).view(-1, 1, 1, 1)


@pytest.mark.parametrize("eps", ["timm", "original"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_standardised_filters_and_their_gradient(eps, dtype):
    def of_timm(w):
        return torch.nn.functional.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, eps=1e-8).reshape(
            w.shape
        )

    def of_jax(w):
        return jax_vit.standardised(w.permute(2, 3, 1, 0)).permute(3, 2, 0, 1)

    want = of_timm if eps == "timm" else of_jax
    weight, found = narrow_filters().to(dtype), []
    dy = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    for function, leaf in ((lambda w: standardised(w, eps), weight), (want, weight.double()), (want, weight)):
        leaf = leaf.clone().requires_grad_()
        y = function(leaf)
        y.backward(dy.to(leaf))
        found.append((y, leaf.grad))
    for i in range(len(weight)):  # each filter's gradient has a scale of its own
        assert_close(f"filter {i}", *(y[i] for y, _ in found))
        assert_close(f"gradient of filter {i}", *(grad[i] for _, grad in found), gradient=True)


def test_a_constant_filter_has_a_finite_gradient():
    for eps in ("timm", "original"):
        weight = torch.full((2, 3, 1, 1), 0.25, requires_grad=True)
        y = standardised(weight, eps)
        y.sum().backward()
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.isfinite(weight.grad).all()


CHANGES = {
    "a step": lambda conv: conv.weight.add_(torch.randn_like(conv.weight)),
    "through .data": lambda conv: conv.weight.data.add_(torch.randn_like(conv.weight)),
    "another parameter": lambda conv: setattr(conv, "weight", torch.nn.Parameter(torch.randn_like(conv.weight))),
    "a state_dict": lambda conv: conv.load_state_dict({"weight": torch.randn_like(conv.weight)}),
    "other memory": lambda conv: setattr(conv.weight, "data", torch.randn_like(conv.weight)),
}


@pytest.mark.parametrize("eps", ["timm", "original"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_kept_filters_follow_their_weight(change, eps):
    conv = randomize(StdConv2d(3, 32, 3, 1, eps))
    x = noise((9, 9))
    conv(x)
    before = conv(x)
    CHANGES[change](conv)
    fresh = StdConv2d(3, 32, 3, 1, eps)
    fresh.weight.copy_(conv.weight)
    assert torch.equal(conv(x), fresh(x))
    assert not torch.equal(conv(x), before)


@torch.no_grad()
def test_equal_weights_share_no_filters_of_other_epsilons():
    convs = [StdConv2d(3, 32, 3, 1, eps) for eps in ("timm", "original")]
    for conv in convs:
        conv.weight.copy_(1e-4 * torch.randn(32, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
        conv(noise((9, 9)))
    first, second = (conv(noise((9, 9))) for conv in convs)
    assert (first - second).abs().max() > 0.1


def test_filters_are_standardised_once_for_inference_and_nothing_remains(monkeypatch):
    _, ours = pair()
    ours(noise((32, 32)))
    keys, size, calls = set(ours.state_dict()), len(pickle.dumps(ours)), []
    monkeypatch.setattr(hybrid, "standardised", lambda weight, eps: calls.append(eps) or standardised(weight, eps))
    with torch.inference_mode():
        ours(noise((32, 32)))
        first = ours(noise((32, 32)))
        calls.clear()
        assert torch.equal(ours(noise((32, 32))), first)
        assert not calls
    assert set(ours.state_dict()) == keys
    assert len(pickle.dumps(ours)) == size
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(ours)(noise((32, 32))), first)
    ours.patch_embed.backbone.requires_grad_(False)
    leaf = noise((32, 32)).requires_grad_()
    ours(leaf).sum().backward()  # through filters that inference mode has made
    assert leaf.grad.abs().max() > 0
    calls.clear()
    ours.requires_grad_()(noise((32, 32)))
    assert len(calls) == sum(isinstance(m, StdConv2d) for m in ours.modules())


def test_gradient_checkpointing_changes_nothing():
    model = ours_of((1, 2), 1, (24, 24)).train()

    def grads():
        model.zero_grad()
        model(noise((24, 24))).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = grads()
    model.set_grad_checkpointing()
    seen = []
    model.patch_embed.backbone.stages[1].blocks[1].conv2.register_forward_hook(lambda *_: seen.append(1))
    assert all(map(torch.equal, grads(), want))
    assert len(seen) == 2  # once forward, once again


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_intermediates_of_an_odd_image(fmt):
    theirs, ours = pair((1, 1, 1), 1, (35, 51), depth=2)
    x = noise((35, 51))
    with torch.no_grad():
        want = theirs.forward_intermediates(x, output_fmt=fmt)[1]
        got = ours.forward_intermediates(x, output_fmt=fmt)[1]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-4)


def test_helpers_are_timms():
    theirs, ours = pair()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.no_weight_decay() <= theirs.no_weight_decay()
    assert ours.patch_embed.feat_ratio() == theirs.patch_embed.feat_ratio() == 8
    for model in (theirs, ours):
        model.reset_classifier(5, "avg")
    ours.head.load_state_dict(theirs.head.state_dict())
    assert_same(theirs, ours, noise((32, 32)))


def test_initial_weights_are_distributed_as_timms():
    ours = fastvit.VisionTransformer(**TINY, img_size=32, patch_size=8, backbone=(2, 2))
    made = timm.models.vision_transformer_hybrid
    theirs = made._create_vision_transformer_hybrid("x", made._resnetv2((2, 2)), **TINY, img_size=32)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.1) or a.numel() < 2000, name
        assert torch.equal(a, b) or "norm" not in name, name


def test_autocast_as_timms():
    theirs, ours = pair()
    x = noise((32, 32))
    exact = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x), theirs(x)
    assert got.dtype == want.dtype
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()


def test_one_graph_under_compile():
    _, ours = pair((1,), 2)
    with torch.no_grad():
        got = torch.compile(ours, backend="eager", fullgraph=True)(noise((32, 32)))
        assert torch.allclose(got, ours(noise((32, 32))), atol=1e-5)


def test_the_papers_figures_read_a_hybrid():
    _, ours = pair((1, 1), 1, (35, 51))
    x = noise((35, 51))
    assert analysis.patch_grid(ours, x) == (5, 7)
    assert fastvit.attention_maps(ours, x, 0)[0].shape[-1] == 36
    assert analysis.pos_embed_similarity(ours).shape == (5, 7, 5, 7)
    assert analysis.attention_distance(ours, x=x).shape == (1, 3)
    with pytest.raises(ValueError, match="does not project patches of pixels"):
        analysis.embedding_filters(ours)


def test_the_command_line_knows_a_hybrid_by_its_tensors():
    for name in ("vit_base_r50_s16_384", "vit_small_r26_s32_224", "vit_tiny_r_s16_p8_384", "vit_base_patch16_224"):
        assert _preset_of(fastvit.create_model(name, device="meta").state_dict(), "file") == name


def test_report_names_what_runs_fused():
    rows = {row.name: row for row in fastvit.report(pair()[1])}
    assert list(rows["patch_embed.proj"].ops) == ["patch_embed"]
    assert not rows["patch_embed.backbone.stem.conv"].ops
    assert "attention" in rows["blocks.0"].ops


def test_modules_describe_themselves():
    assert "relu=False" in repr(GroupNormAct(64, "timm", relu=False))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("backbone must be None or at most 4 numbers", {"backbone": (1, 1, 1, 1, 1)}),
        ("backbone must be None or at most 4 numbers", {"backbone": (1, 0)}),
        ("backbone must be None or at most 4 numbers", {"backbone": 50}),
        ("patch_size must be a multiple of 8, the stride of backbone", {"backbone": (1, 1), "patch_size": 12}),
        ("backbone_eps must be one of", {"backbone": (1,), "backbone_eps": "jax"}),
        ("must hold at least one patch", {"backbone": (1,), "patch_size": 16, "img_size": (11, 32)}),
    ],
)
def test_bad_options(words, options):
    with pytest.raises(ValueError, match=words):
        fastvit.VisionTransformer(**{**TINY, "img_size": 32, "patch_size": 8, **options})


@pytest.mark.parametrize(
    ("error", "words", "options", "image"),
    [
        (ValueError, r"image size \(32, 40\) does not match", {}, torch.zeros(1, 3, 32, 40)),
        (ValueError, r"image must be \(B, 3, height, width\)", {}, torch.zeros(3, 32, 32)),
        (ValueError, r"image must be \(B, 3, height, width\)", {}, torch.zeros(1, 4, 32, 32)),
        (TypeError, "the model's dtype torch.float32 or uint8", {}, torch.zeros(1, 3, 32, 32).double()),
        (ValueError, "at least one patch", {"dynamic_img_size": True, "patch": 2}, torch.zeros(1, 3, 40, 4)),
    ],
)
def test_bad_images(error, words, options, image):
    options = {"patch": 1, **options}
    with pytest.raises(error, match=words):
        ours_of((1,), options.pop("patch"), (32, 32), **options)(image)
