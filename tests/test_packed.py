"""Images of different sizes in one row against the same images one by one: timm's model, and plain PyTorch."""

import copy

import pytest
import torch
from models import SMALL, randomize
from plain_vit import plain_vit
from test_model import pair
from tolerances import assert_close

import fastvit
from fastvit import native, packed

SIZES = [(32, 32), (8, 40), (21, 50), (32, 32), (16, 64), (64, 16), (47, 9)]
# With these and an odd number of prefix tokens every image has an even number of them: of bfloat16 rows of odd length
# oneDNN reads what lies behind (AMX), in eager PyTorch, and of images one patch wide, too.
ODD = [(24, 40), (8, 40), (24, 63), (24, 40), (40, 24), (8, 56), (40, 41)]
OPTIONS = [
    {},
    {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "pool_include_prefix": True},
    {"class_token": False, "reg_tokens": 1, "global_pool": "avgmax", "qk_norm": True},
    {"class_token": False, "global_pool": "avg", "img_size": (16, 64)},
    {"init_values": 0.1, "global_pool": "max", "fc_norm": False, "patch_size": (4, 8), "reg_tokens": 1},
    {"pre_norm": True, "final_norm": False, "in_chans": 1, "num_classes": 0, "qkv_bias": False},
]


def images_of(dtype=torch.float32, channels=3):
    generator, sizes = torch.Generator().manual_seed(3), SIZES if dtype == torch.float32 else ODD
    return [torch.randn(channels, *size, generator=generator).to(dtype) for size in sizes]


def cut(image, patch):
    return image[:, : image.shape[1] // patch[0] * patch[0], : image.shape[2] // patch[1] * patch[1]]


def one_by_one(model, images, dtype):
    return torch.cat([model(cut(image, model.patch_embed.patch_size)[None].to(dtype)) for image in images])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_images_are_the_images_one_by_one(options, dtype, training, monkeypatch):
    if dtype == torch.bfloat16:
        if options.get("class_token") is False:
            options = {**options, "reg_tokens": 1}
        if "max" in options.get("global_pool", ""):  # the largest of numbers of 8 bits is another than in fp64
            options = {**options, "global_pool": "avg"}
    theirs, ours = pair(dynamic_img_size=True, **options)
    plain, ours = theirs.to(dtype).train(training), ours.to(dtype).train(training)
    images = images_of(dtype, options.get("in_chans", 3))
    exact = copy.deepcopy(plain).double()
    found = []
    for model, its in ((exact, torch.float64), (plain, dtype)):
        logits = one_by_one(model, images, its)
        dy = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(its)
        logits.backward(dy)
        found.append(logits)
    got = ours.forward_packed(images)
    assert_close("logits", got, *found)
    got.backward(dy)
    for (name, p), e, b in zip(ours.named_parameters(), exact.parameters(), plain.parameters(), strict=True):
        if not name.endswith("k_norm.bias"):  # whose exact gradient is 0
            assert_close(f"gradient of {name}", p.grad, e.grad, b.grad, gradient=True)
    with torch.no_grad():
        assert_close("logits without gradients", ours.forward_packed(images), *found)
        with fastvit.backend("reference"):
            assert_close("logits of the reference", ours.forward_packed(images), *found)
        monkeypatch.setattr(packed, "ROWS_OF_A_CALL", 1)
        assert_close("logits by the encoder's kernel", ours.forward_packed(images), *found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_and_gradients_of_images(dtype):
    theirs, ours = (m.to(dtype) for m in pair(dynamic_img_size=True, reg_tokens=2))
    exact = copy.deepcopy(theirs).double()
    sources = []
    for its in (dtype, torch.float64, dtype):
        sources.append([image.to(its).requires_grad_() for image in images_of(dtype)])
    got = ours.forward_packed_features(sources[0])
    found = []
    for model, images in ((exact, sources[1]), (theirs, sources[2])):
        found.append([model.forward_features(cut(image, (8, 8))[None])[0] for image in images])
    assert [tuple(tokens.shape) for tokens in got] == [
        (3 + (image.shape[1] // 8) * (image.shape[2] // 8), 48) for image in sources[0]
    ]
    for features in (got, *found):
        for i, tokens in enumerate(features):
            (tokens * (i + 1)).sin().sum().backward(retain_graph=True)
    for i, triple in enumerate(zip(got, *found, strict=True)):
        assert_close(f"tokens of image {i}", *triple)
    for i, triple in enumerate(zip(*sources, strict=True)):
        assert_close(f"gradient of image {i}", *(image.grad for image in triple), gradient=True)


def test_bytes_and_numbers_mix():
    theirs, ours = pair(dynamic_img_size=True)
    images = images_of()
    pixels = [
        torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8),
        torch.randint(0, 256, (3, 24, 8), dtype=torch.uint8),
    ]
    mixed = [pixels[0], *images[:2], pixels[1], images[3]]
    as_numbers = [m.double() / 127.5 - 1 if m.dtype == torch.uint8 else m for m in mixed]
    exact = one_by_one(copy.deepcopy(theirs).double(), as_numbers, torch.float64)
    eager = one_by_one(theirs, as_numbers, torch.float32)
    assert_close("logits", ours.forward_packed(mixed), exact, eager)
    equal = [pixels[0], images[0]]  # one grid, so one batch behind the embedding
    assert_close("logits", ours.forward_packed(equal), exact[[0, 1]], eager[[0, 1]])


def test_any_size_whatever_the_model_is_called_with():
    """No dynamic_img_size, positions of every kind, another way of resizing; as one batch, checkpointed, with hooks."""
    images = images_of()
    for options in ({"pos_embed": "2d"}, {"pos_resize": "original"}, {"pos_embed": "none"}):
        fixed = randomize(fastvit.VisionTransformer(**SMALL, **options)).eval()
        flexible = randomize(fastvit.VisionTransformer(**SMALL, **options, dynamic_img_size=True)).eval()
        want = one_by_one(flexible, images, torch.float32)
        assert torch.allclose(fixed.forward_packed(images), want, atol=1e-4)
    fixed = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    batch = torch.randn(4, 3, 32, 32)
    assert torch.equal(fixed.forward_packed([*batch]), fixed(batch))
    assert torch.equal(
        fixed.forward_packed([*batch], pre_logits=True), fixed.forward_head(fixed.forward_features(batch), True)
    )
    want = fixed.forward_packed(images)
    seen = []
    for name in ("blocks.0", "blocks.1.attn", "blocks.1.mlp.fc1", "blocks.2.norm1", "norm"):
        fixed.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert torch.allclose(fixed.forward_packed(images), want, atol=1e-5)
    assert seen == ["blocks.0", "blocks.1.attn", "blocks.1.mlp.fc1", "blocks.2.norm1", "norm"]


def test_gradient_checkpointing_and_autocast():
    model = randomize(fastvit.VisionTransformer(**SMALL)).train()
    images = images_of()

    def gradients():
        model.zero_grad()
        model.forward_packed(images).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), want, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        low, alone = model.forward_packed(images), torch.cat([model.forward_packed([image]) for image in images])
    exact = model.double().forward_packed([image.double() for image in images])
    assert_close("logits under autocast", low, exact, alone)


def test_branches_are_dropped_by_image():
    """Drop path draws one factor for each image and branch, in the caller's order."""
    model = randomize(fastvit.VisionTransformer(**SMALL, drop_path_rate=0.5, global_pool="avg", fc_norm=False)).train()
    images = [image for image, (h, w) in zip(images_of(), SIZES, strict=True) if not h % 8 and not w % 8]
    torch.manual_seed(11)
    factors = [[1.0] * len(images)] * 2
    for rate in (0.25, 0.5):
        factors += [
            (torch.empty(len(images), 1).bernoulli_(1 - rate) / (1 - rate)).flatten().tolist() for _ in range(2)
        ]
    assert 0 < sum(f == 0.0 for branch in factors for f in branch) < 2 * len(images)
    torch.manual_seed(11)
    got = model.forward_packed_features(images)
    found = []
    for dtype in (torch.float64, torch.float32):
        state = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
        flexible = randomize(fastvit.VisionTransformer(**SMALL, dynamic_img_size=True)).to(dtype)
        tokens = []
        for i, image in enumerate(images):
            its = copy.deepcopy(flexible)
            its.set_input_size(image.shape[1:])
            positions = its.pos_embed[0].detach()
            tokens.append(plain_vit(state, image.to(dtype), positions, 3, factors=[branch[i] for branch in factors]))
        found.append(tokens)
    for i, triple in enumerate(zip(got, *found, strict=True)):
        assert_close(f"tokens of image {i}", *triple)


@pytest.mark.parametrize(
    "rate", ["drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"]
)
def test_every_rate_acts_on_rows(rate):
    model = randomize(fastvit.VisionTransformer(**SMALL, **{rate: 0.5})).train()
    images = images_of()
    first, second = model.forward_packed(images), model.forward_packed(images)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    kept = 0.5 if rate == "patch_drop_rate" else 1.0
    lengths = [len(tokens) for tokens in model.forward_packed_features(images)]
    assert lengths == [1 + max(1, int((h // 8) * (w // 8) * kept)) for h, w in SIZES]
    plain = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    assert torch.equal(model.eval().forward_packed(images), plain.forward_packed(images))


def test_images_do_not_meet():
    """NaN in one image stays in it; the order of the others does not matter."""
    model = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    images = images_of()
    with torch.no_grad():
        want = model.forward_packed(images)
        images[2][0, 3, 4] = torch.nan
        got = model.forward_packed(images)
        ill = got.isnan().all(1)
        assert ill.tolist() == [i == 2 for i in range(len(images))]
        assert torch.equal(got[~ill], want[~ill])
        turned = model.forward_packed(images[::-1])
    assert torch.allclose(turned.flip(0)[~ill], want[~ill], atol=1e-5)


def test_the_cpu_pads_nothing_and_calls_once_for_neighbours_of_one_length():
    cu = torch.tensor([0, 4, 8, 8, 11, 11, 14, 20], dtype=torch.int32)
    assert native._runs(cu, 20) == [(0, 2, 4), (8, 1, 3), (11, 1, 3), (14, 1, 6)]
    qkv = torch.randn(20, 3 * 32)
    for wrong in ([0, 4, 21], [0, 4, 8], [1, 20], [0, 12, 8, 20]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 20, the rows, got"):
            fastvit.ops.attention_varlen(qkv, torch.tensor(wrong, dtype=torch.int32), 20, 2)


def test_errors():
    model = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    image = torch.randn(3, 32, 32)
    for wrong, error, words in (
        ([], ValueError, "images must hold at least one image, got none"),
        ([image, torch.randn(3, 32, 7)], ValueError, r"images\[1\] is 32 x 7 pixels, smaller than a patch of 8 x 8"),
        ([image, torch.randn(1, 32, 32)], ValueError, r"images\[1\] must be \(3, height, width\), got \(1, 32, 32\)"),
        ([torch.randn(1, 3, 32, 32)], ValueError, r"images\[0\] must be \(3, height, width\), got \(1, 3, 32, 32\)"),
        ([image, "cat.jpg"], TypeError, r"images\[1\] must be a Tensor, got str"),
        (
            [image, image.double()],
            TypeError,
            "image must have weight's dtype torch.float32 or uint8, got torch.float64",
        ),
    ):
        with pytest.raises(error, match=words):
            model.forward_packed(wrong)
    pools_nothing = fastvit.VisionTransformer(**{**SMALL, "num_classes": 0, "global_pool": ""})
    with pytest.raises(ValueError, match="global_pool='' pools nothing; use forward_packed_features"):
        pools_nothing.forward_packed([image])
    relative = randomize(fastvit.VisionTransformer(**SMALL, pos_embed="relative")).eval()
    assert torch.allclose(relative.forward_packed([image]), relative(image[None]), atol=1e-6)
    with pytest.raises(ValueError, match="relative positions are distances in a sequence of 4 x 4 patches"):
        relative.forward_packed([image, torch.randn(3, 16, 64)])


def test_images_of_a_hybrid_keep_their_last_rows():
    """A ResNet's feature map has a position for less than a stride of pixels, so nothing is cut off its images."""
    options = {**SMALL, "img_size": 32, "patch_size": 4, "backbone": (), "dynamic_img_size": True}
    model = randomize(fastvit.VisionTransformer(**options))
    exact, sizes = copy.deepcopy(model).double(), [(32, 32), (21, 50), (9, 14), (32, 32)]
    images = [torch.randn(3, *size) for size in sizes]
    want, eager = (torch.cat([m(image[None].to(m.head.weight.dtype)) for image in images]) for m in (exact, model))
    assert_close("logits", model.forward_packed(images), want, eager)
    with pytest.raises(ValueError, match=r"images\[0\] is 3 x 32 pixels, smaller than a patch of 4 x 4"):
        model.forward_packed([torch.randn(3, 3, 32)])
