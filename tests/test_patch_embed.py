"""patch_embed: every backend against fp64 mathematics, forward and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from harness import check, dtypes_of, places

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
