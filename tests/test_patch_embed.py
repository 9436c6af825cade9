"""patch_embed: every backend against fp64 mathematics, forward and all gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import check, check_upstreams, dtypes_of, places
from tolerances import assert_close

import fastvit
from fastvit import ops

PLACES = places("patch_embed")


def eager(image, weight, bias=None, pos_embed=None, prefix=None, mean=None, std=None):
    if image.dtype == torch.uint8:
        image = image.double() / 255
    if mean is not None:
        mean, std = (torch.tensor(t, dtype=image.dtype).view(-1, 1, 1) for t in (mean, std))
        image = (image - mean) / std
    x = F.conv2d(image.to(weight.dtype), weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if pos_embed is not None and pos_embed.shape[1] == x.shape[1]:
        x, pos_embed = x + pos_embed, None
    if prefix is not None:
        x = torch.cat([prefix.expand(len(x), -1, -1), x], 1)
    return x if pos_embed is None else x + pos_embed


def sample(batch=2, channels=3, grid=(2, 3), patch=(8, 8), dim=40, prefix=1, positions="all", bias=True):
    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    patches = grid[0] * grid[1]
    rows = {"all": patches + prefix, "patches": patches, None: 0}[positions]
    return {
        "image": randn(batch, channels, grid[0] * patch[0], grid[1] * patch[1]),
        "weight": randn(dim, channels, *patch) / (channels * patch[0] * patch[1]) ** 0.5,
        "bias": randn(dim) if bias else None,
        "pos_embed": randn(1, rows, dim) if rows else None,
        "prefix": randn(1, prefix, dim) if prefix else None,
    }


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"prefix": 0, "positions": "patches", "dim": 65},
        {"prefix": 5, "positions": "patches", "bias": False},
        {"prefix": 2, "positions": None, "patch": (4, 6), "channels": 1},
        {"prefix": 0, "positions": None, "grid": (1, 1), "patch": (14, 14), "batch": 1, "channels": 5},
        {"grid": (5, 7), "patch": (4, 4), "dim": 33},
    ],
    ids=str,
)
@pytest.mark.parametrize("place", PLACES)
def test_parity(place, shape):
    for dtype in dtypes_of(place):
        check(place, dtype, ops.patch_embed, eager, sample(**shape))


MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.3)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: F.pad(x, (5, 3, 2, 1), value=torch.nan)[..., 2:-1, 5:-3],
    "cropped channels_last": lambda x: F.pad(x.permute(0, 2, 3, 1), (0, 0, 3, 2, 1, 1), value=torch.nan)[
        :, 1:-1, 3:-2
    ].permute(0, 3, 1, 2),
    "padded pixels": lambda x: F.pad(x.permute(0, 2, 3, 1), (0, 1), value=torch.nan)[..., :-1].permute(0, 3, 1, 2),
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "every second pixel": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
}


@pytest.mark.grid(14)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("patch", [(4, 4), (8, 8), (14, 14), (16, 16), (32, 32), (8, 4), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_patches_and_layouts(place, dtype, patch, channels, layout):
    prefix, positions = [(0, "patches"), (1, "all"), (4, "patches"), (2, None)][(sum(patch) + channels) % 4]
    tensors = sample(2, channels, (2, 3), patch, 40 + channels, prefix, positions)
    normalise = {"mean": MEAN[:channels], "std": STD[:channels]} if patch[0] == 8 and dtype == torch.float32 else {}

    def through(function):
        return lambda image, **rest: function(LAYOUTS[layout](image), **rest, **normalise)

    check(place, dtype, through(ops.patch_embed), through(eager), tensors)


WIDTHS = (64, 192, 384, 768, 1000, 1023, 1024, 1280)
GRIDS = (
    *((1, 1), (1, 2), (3, 5), (4, 4), (1, 17), (7, 7), (8, 8), (5, 13), (8, 16), (3, 43)),
    *((14, 14), (16, 16), (24, 24), (32, 32)),
)


@pytest.mark.grid(10)
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_tokens_and_widths(place, grid, dim):
    case = list(itertools.product(GRIDS, WIDTHS)).index((grid, dim))
    batch, prefix = (1, 3, 0)[case % 3], (1, 0, 2, 5)[case % 4]
    dtype = (torch.float32, torch.float16, torch.bfloat16)[(case // 3 + case) % 3]
    tensors = sample(batch, 2, grid, (2, 3), dim, prefix, ("all", "patches")[case % 2])
    check(place, dtype, ops.patch_embed, eager, tensors)


@pytest.mark.grid(9)
@pytest.mark.parametrize("pixels", ["rows of pixels", "planes", "cropped rows", "mirrored"])
@pytest.mark.parametrize("patch", [(4, 4), (14, 14), (16, 16), (8, 4)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("place", PLACES)
def test_decoded_photographs(place, channels, patch, pixels):
    """A uint8 image (B, height, width, C) goes into the op as it was decoded; every gradient but the image's."""
    tensors = sample(3, channels, (2, 3), patch, 24)
    shape = tensors.pop("image").permute(0, 2, 3, 1).shape
    image = torch.randint(0, 256, (shape[0], shape[1] + 3, shape[2] + 2, channels), dtype=torch.uint8)
    image = image[:, 1:-2, 2:] if pixels == "cropped rows" else image[:, 3:, 2:].contiguous()
    image = image.permute(0, 3, 1, 2)
    image = {"planes": image.contiguous(), "mirrored": image.mT.contiguous().mT}.get(pixels, image)
    normalise = {"mean": MEAN[:channels], "std": STD[:channels]}

    def on(function):
        return lambda image, **rest: function(image, **rest, **normalise)

    for dtype in (torch.float32, torch.bfloat16) if channels == 3 else (torch.float16,):
        check(place, dtype, on(ops.patch_embed), on(eager), tensors, {"image": image})


@pytest.mark.parametrize("place", PLACES)
def test_uint8_and_normalisation(place):
    tensors = sample()
    shape = tensors.pop("image").shape
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def op(weight, bias, pos_embed, prefix, image):
        return ops.patch_embed(image, weight, bias, pos_embed, prefix, mean=mean, std=std)

    def plain(weight, bias, pos_embed, prefix, image):
        return eager(image, weight, bias, pos_embed, prefix, mean, std)

    for dtype in dtypes_of(place):
        if dtype != torch.float64:  # pixels are normalised with fp32 factors
            check(place, dtype, op, plain, tensors, {"image": image})
    with fastvit.backend(place.backend):
        weight = tensors["weight"].float().to(place.device)
        bare = ops.patch_embed(image.to(place.device), weight)
    assert torch.allclose(bare.cpu(), eager(image, weight.cpu()), atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_float_normalisation_differentiates_the_image(place):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    check(
        place,
        torch.float32,
        lambda image, weight: ops.patch_embed(image, weight, mean=mean, std=std),
        lambda image, weight: eager(image, weight, mean=mean, std=std),
        {k: t for k, t in sample().items() if k in ("image", "weight")},
    )


@pytest.mark.parametrize("place", PLACES)
def test_views_equal_contiguous(place):
    image = torch.randn(2, 3, 16, 24, device=place.device)
    weight = torch.randn(20, 3, 8, 8, device=place.device)
    large = torch.full((2, 3, 40, 60), torch.nan, device=place.device)
    large[..., 3:19, 5:29] = image
    strided = torch.full((2, 3, 32, 48), torch.nan, device=place.device)
    strided[..., ::2, ::2] = image
    with fastvit.backend(place.backend):
        want = ops.patch_embed(image, weight)
        for view in (
            large[..., 3:19, 5:29],
            strided[..., ::2, ::2],
            image.to(memory_format=torch.channels_last),
            image.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        ):
            assert torch.allclose(ops.patch_embed(view, weight), want, atol=2e-5)
        repeated = ops.patch_embed(image[:1].expand(3, -1, -1, -1), weight)
        assert torch.allclose(repeated, want[:1].expand(3, -1, -1), atol=2e-5)
        assert torch.allclose(ops.patch_embed(image, weight.to(memory_format=torch.channels_last)), want, atol=2e-5)


@pytest.mark.parametrize("place", PLACES)
def test_empty_and_written(place, nan_filled):
    tensors = {k: t.float().to(place.device).requires_grad_() for k, t in sample().items()}
    with fastvit.backend(place.backend):
        y = ops.patch_embed(**tensors)
        assert not y.isnan().any()
        for grad in torch.autograd.grad(y.sum(), list(tensors.values())):
            assert not grad.isnan().any()
        empty = ops.patch_embed(**{**tensors, "image": tensors["image"][:0]})
        (grad,) = torch.autograd.grad(empty.sum(), tensors["weight"])
    assert empty.shape == (0, 7, 40)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_incoming_gradients_of_any_layout(place, dtype):
    check_upstreams(place, dtype, ops.patch_embed, sample(dim=48), exact=place.backend == "triton")


@pytest.mark.parametrize("place", PLACES)
def test_same_bits_again(place):
    tensors = {k: t.float().to(place.device).requires_grad_() for k, t in sample(5, 3, (3, 4), (8, 8), 70).items()}
    with fastvit.backend(place.backend):
        runs = []
        for _ in range(2):
            y = ops.patch_embed(**tensors)
            runs.append([y, *torch.autograd.grad(y.square().sum(), list(tensors.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_timm_patch_embed(place):
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.PatchEmbed(img_size=(32, 48), patch_size=(8, 16), in_chans=3, embed_dim=50).double()
    image, positions = torch.randn(2, 3, 32, 48).double(), torch.randn(1, 12, 50).double()
    exact = theirs(image) + positions
    eagerly = theirs.float()(image.float()) + positions.float()
    arguments = (image, theirs.proj.weight, theirs.proj.bias, positions)
    with fastvit.backend(place.backend):
        got = ops.patch_embed(*(t.float().to(place.device) for t in arguments))
    assert_close("tokens", got, exact, eagerly)


@pytest.mark.parametrize("place", [p for p in PLACES if p.values[0].backend != "reference"])
def test_registered_with_pixel_factors(place):
    image = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, device=place.device).permute(0, 3, 1, 2)
    weight, bias, table = (
        torch.randn(s, device=place.device, requires_grad=True) for s in ((6, 3, 4, 4), (6,), (5, 6))
    )
    factors = [0.01, 0.02, 0.03], [-1.0, 0.5, 2.0]
    arguments = (image, weight, bias, table, table[:1].detach(), *factors, place.backend)
    torch.library.opcheck(torch.ops.fastvit.patch_embed, arguments)


@pytest.mark.parametrize("place", PLACES)
def test_normalisation_compiles_in_one_graph_and_holds_no_state(place):
    """mean and std travel as numbers: nothing is copied to the device, cached, or left over from another mode."""
    image = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, device=place.device).permute(0, 3, 1, 2)
    weight = torch.randn(6, 3, 4, 4, device=place.device, requires_grad=True)

    def call(image):
        return ops.patch_embed(image, weight, mean=MEAN[:3], std=STD[:3])

    with fastvit.backend(place.backend):
        with torch.inference_mode():
            want = call(image)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert call(fake.from_tensor(image)).shape == want.shape
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        (expected,) = torch.autograd.grad(call(image).sum(), weight)
        for batch in (image, image[:1]):
            y = compiled(batch)
            torch.testing.assert_close(y, want[: len(batch)])
        (grad,) = torch.autograd.grad(compiled(image).sum(), weight)
    torch.testing.assert_close(grad, expected)


def test_pixel_factors_are_numbers():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    *_, scale, shift = ops.prepare_patch_embed(image, W, mean=MEAN[:3], std=STD[:3])
    assert scale == pytest.approx([1 / (255 * s) for s in STD[:3]])
    assert shift == pytest.approx([-m / s for m, s in zip(MEAN, STD[:3], strict=False)])
    *_, scale, shift = ops.prepare_patch_embed(IMAGE, W)
    assert scale is None
    assert shift is None


def test_gradcheck():
    leaves = {k: t.requires_grad_() for k, t in sample(1, 2, (1, 2), (2, 2), 3).items()}
    for backend in ("reference", "cpu"):
        if fastvit.is_available(backend):
            with fastvit.backend(backend):
                assert torch.autograd.gradcheck(ops.patch_embed, tuple(leaves.values()), nondet_tol=0)


IMAGE, W = torch.randn(1, 3, 16, 16), torch.randn(8, 3, 8, 8)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "image must be a Tensor", lambda: ops.patch_embed(None, W)),
        (ValueError, r"image must be \(B, C, height, width\)", lambda: ops.patch_embed(IMAGE[0], W)),
        (ValueError, r"image must be \(B, 3, a multiple of 8", lambda: ops.patch_embed(IMAGE[..., :15], W)),
        (ValueError, r"image must be \(B, 3, a multiple of 8", lambda: ops.patch_embed(IMAGE[:, :2], W)),
        (TypeError, "image must have weight's dtype torch.float32 or uint8", lambda: ops.patch_embed(IMAGE.half(), W)),
        (ValueError, "weight must be 4-D", lambda: ops.patch_embed(IMAGE, W[0])),
        (ValueError, r"pos_embed must have 4 rows", lambda: ops.patch_embed(IMAGE, W, None, torch.ones(5, 8))),
        (ValueError, r"pos_embed must have shape \(4, 8\)", lambda: ops.patch_embed(IMAGE, W, None, torch.ones(4, 7))),
        (ValueError, "mean must have one entry per channel", lambda: ops.patch_embed(IMAGE, W, mean=(0.5,))),
        (ValueError, "std must be positive", lambda: ops.patch_embed(IMAGE, W, std=(1.0, 0.0, 1.0))),
        (TypeError, "prefix must be a Tensor", lambda: ops.patch_embed(IMAGE, W, prefix=3)),
    ],
)
def test_bad_calls(error, words, call):
    with pytest.raises(error, match=words):
        call()
