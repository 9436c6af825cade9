"""The patch_embed launcher: what it reads and writes, layouts, pixel types, every tile, sums in parts, far strides."""

import math

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, arena, double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import _tuning_patches, patch_embed

SCALE, SHIFT = [0.02, 0.013, 0.008], [-2.1, 0.3, 1.7]


def normalised(image, dtype):
    scale, shift = (torch.tensor(values, device=DEVICE)[:, None, None] for values in (SCALE, SHIFT))
    return (image * scale + shift).to(dtype)


def patches_of(image, patch):
    """The rows (B, N, C·P·Q) of a patch matrix."""
    return F.unfold(image, patch, stride=patch).mT


@each_dtype
@pytest.mark.parametrize("patch", [(16, 16), (3, 5)])
@pytest.mark.parametrize("prefixed_positions", [True, False])
def test_patch_embed(dtype, patch, prefixed_positions):
    height, width = 2 * patch[0], 3 * patch[1]
    weight = arena(torch.randn(40, 3, *patch).to(dtype) / 20).contiguous()
    bias, prefix = random(40, dtype=dtype), random(2, 40, dtype=dtype)
    table = random(8 if prefixed_positions else 6, 40, dtype=dtype)

    def mathematics(image, weight, bias, prefix, table):
        patches = F.conv2d(image, weight, bias, stride=patch).flatten(2).mT
        if not prefixed_positions:
            patches = patches + table
        tokens = torch.cat([prefix.expand(2, -1, -1), patches], dim=1)
        return tokens + table if prefixed_positions else tokens

    floats = random(2, 3, height + 2, width + 3, dtype=dtype)[..., 1:-1, 2:-1]
    channels_last = torch.randn(2, 3, height, width).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    for image in (floats, channels_last):
        tokens = run(patch_embed, image, weight, bias, table, prefix, None, None)
        tensors = (image, weight, bias, prefix, table)
        assert_close("tokens", tokens, mathematics(*double(*tensors)), mathematics(*tensors))
    pixels = arena(torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)).permute(0, 3, 1, 2)
    tokens = run(patch_embed, pixels, weight, bias, table, prefix, SCALE, SHIFT)
    tensors = (normalised(pixels, dtype), weight, bias, prefix, table)
    assert_close("uint8", tokens, mathematics(*double(*tensors)), mathematics(*tensors))
    bare = patch_embed.forward(floats, weight, None, None, None, None, None)
    exact, eager = (F.conv2d(*t, stride=patch).flatten(2).mT for t in (double(floats, weight), (floats, weight)))
    assert_close("bare", bare, exact, eager)


@each_dtype
@pytest.mark.parametrize("decoded", [True, False])
def test_normalised_pixels_are_rounded_once(dtype, decoded):
    """An identity for a weight gives the pixels themselves."""
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, device=DEVICE)
    image = pixels.contiguous(memory_format=torch.channels_last) if decoded else pixels
    weight = torch.eye(48, device=DEVICE, dtype=dtype).view(48, 3, 4, 4)
    got = patch_embed.forward(image, weight, None, None, None, SCALE, SHIFT)
    scale, shift = (torch.tensor(values, device=DEVICE).double()[:, None, None] for values in (SCALE, SHIFT))
    want = patches_of(pixels * scale + shift, (4, 4))
    assert ((got.double() - want).abs() <= 0.501 * torch.finfo(dtype).eps * want.abs() + 1e-6).all()


def gradients(dy, image, weight, prefix, positions):
    """The mathematics of the backward, by the matrix of patches: names and values."""
    total, patches = dy.sum(0), dy[:, prefix:].flatten(0, 1)
    dweight = patches.mT @ patches_of(image, weight.shape[2:]).flatten(0, 1)
    dx = (patches @ weight.flatten(1)).unflatten(0, (len(dy), -1)).mT
    return {
        "dimage": F.fold(dx, image.shape[2:], weight.shape[2:], stride=weight.shape[2:]),
        "dweight": dweight.view_as(weight),
        "dbias": patches.sum(0),
        "dpos_embed": total[len(total) - positions :],
        "dprefix": total[:prefix],
    }


@each_dtype
@pytest.mark.parametrize("patch", [(16, 16), (3, 5)])
@pytest.mark.parametrize("pixels", ["float", "scaled", "uint8", "channels last"])
def test_backward(dtype, patch, pixels):
    height, width = 2 * patch[0], 3 * patch[1]
    weight = arena(torch.randn(40, 3, *patch).to(dtype) / 20).contiguous()
    dy = random(3, 8, 40, dtype=dtype)
    image = random(3, 3, height + 2, width + 3, dtype=dtype)[..., 1:-1, 2:-1]
    factors = (SCALE, SHIFT) if pixels in ("scaled", "uint8") else (None, None)
    if pixels == "uint8":
        image = arena(torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8)).permute(0, 3, 1, 2)
    elif pixels == "channels last":
        image = image.contiguous(memory_format=torch.channels_last)
    entered = image if factors[0] is None else normalised(image, dtype)
    exact = gradients(*double(dy, entered, weight), 2, 8)
    eager = gradients(dy, entered, weight, 2, 8)
    if pixels == "scaled":
        scale = torch.tensor(SCALE, device=DEVICE)[:, None, None]
        exact["dimage"], eager["dimage"] = exact["dimage"] * scale, (eager["dimage"] * scale).to(dtype)
    got = run(patch_embed, dy, image, weight, *factors, 8, 2, pixels != "uint8", entry="backward")
    for (name, want), base, actual in zip(exact.items(), eager.values(), got, strict=True):
        if name == "dimage" and pixels == "uint8":
            assert actual.numel() == 0
        else:
            assert actual.is_contiguous()
            assert_close(name, actual, want, base, gradient=True)


def every_tile():
    tiles = {tile for tiles in _tuning_patches.PATCHES.values() for tile in tiles}
    return sorted(tiles, key=lambda tile: tuple(vars(tile).values()))


@pytest.mark.parametrize("tile", every_tile(), ids=lambda t: f"{t.BLOCK_M}x{t.BLOCK_N}x{t.BLOCK_K}-{t.num_stages}")
def test_every_tile_gives_the_same(tile, monkeypatch):
    """Three row tiles and more than one of columns, none of them full; sums in three parts, the last of them short."""
    dtype = torch.float16
    batch = 2 * tile.BLOCK_M // 12 + 1
    image, weight = random(batch, 3, 12, 16, dtype=dtype), random(tile.BLOCK_N + 9, 3, 4, 4, dtype=dtype).contiguous()
    dy = random(batch, 13, tile.BLOCK_N + 9, dtype=dtype)
    monkeypatch.setattr(_tuning_patches, "patches", lambda *_: tile)
    monkeypatch.setattr(_tuning_patches, "patches_weight", lambda *_: (tile, 3))
    tokens = run(patch_embed, image, weight, None, None, None, None, None)
    exact, eager = (patches_of(t[0], (4, 4)) @ t[1].flatten(1).mT for t in (double(image, weight), (image, weight)))
    assert_close("tokens", tokens, exact, eager)
    got = run(patch_embed, dy, image, weight, None, None, 13, 1, True, entry="backward")
    exact, eager = gradients(*double(dy, image, weight), 1, 13), gradients(dy, image, weight, 1, 13)
    for name, actual in zip(exact, got, strict=True):
        assert_close(name, actual, exact[name], eager[name], gradient=True)


@pytest.mark.parametrize("tile", ["TOKENS_SUM", "PARTS_SUM", "BIAS_SUM"])
@pytest.mark.parametrize("images", [1, 19])
def test_every_tile_of_sums(tile, images, monkeypatch):
    """Fewer rows than the tile has and more, and a last band of columns that is not full."""
    monkeypatch.setattr(_tuning_patches, "patches_sum", lambda *_: getattr(_tuning_patches, tile))
    image, dy = random(images, 1, 4, 6, dtype=torch.float32), random(images, 5, 300, dtype=torch.float32)
    weight = torch.randn(300, 1, 2, 3, device=DEVICE)
    got = run(patch_embed, dy, image, weight, None, None, 4, 1, False, entry="backward")
    exact, eager = gradients(*double(dy, image, weight), 1, 4), gradients(dy, image, weight, 1, 4)
    for name, actual in list(zip(exact, got, strict=True))[1:]:
        assert_close(name, actual, exact[name], eager[name], gradient=True)


@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (16, 1), (17, 2), (100, 4), (100, 40)])
def test_sum_over_patches_in_parts(rows, splits, monkeypatch):
    """Also parts of one row, and more parts than there are blocks of rows."""
    choose = _tuning_patches.patches_weight
    monkeypatch.setattr(_tuning_patches, "patches_weight", lambda *sizes: (choose(*sizes)[0], splits))
    image, dy = random(rows, 3, 4, 4, dtype=torch.float32), random(rows, 1, 20, dtype=torch.float32)
    weight = torch.randn(20, 3, 4, 4, device=DEVICE)
    dweight = run(patch_embed, dy, image, weight, None, None, 0, 0, False, entry="backward")[1]
    want = gradients(*double(dy, image, weight), 0, 0)["dweight"]
    assert_close("dweight", dweight, want, gradients(dy, image, weight, 0, 0)["dweight"], gradient=True)


def test_sum_over_many_patches_is_kept_in_fp32(monkeypatch):
    choose = _tuning_patches.patches_weight
    monkeypatch.setattr(_tuning_patches, "patches_weight", lambda *sizes: (choose(*sizes)[0], 1))
    image, dy = (random(1500, *shape, dtype=torch.bfloat16) for shape in ((3, 4, 4), (1, 20)))
    weight = torch.randn(20, 3, 4, 4, device=DEVICE).bfloat16()
    dweight = patch_embed.backward(dy, image, weight, None, None, 0, 0, False)[1]
    want = gradients(*double(dy, image, weight), 0, 0)["dweight"]
    assert_close("dweight", dweight, want, gradients(dy, image, weight, 0, 0)["dweight"], gradient=True)


def test_tiles_and_parts_follow_from_the_shapes_alone():
    many = _tuning_patches.patches_weight("sm_90", 2, 256 * 196, 768, 768, True)
    assert many[1] == 7  # of 18 tiles each, for 132 cores
    assert _tuning_patches.patches_weight("sm_90", 2, 196, 768, 768, True)[1] == 1
    assert _tuning_patches.patches("sm_90", 2, 256 * 196, 768, True).BLOCK_N == 256
    assert _tuning_patches.patches("sm_90", 2, 196, 768, True).BLOCK_M == 64
    assert _tuning_patches.patches_sum(197, 256, 768) is _tuning_patches.TOKENS_SUM
    assert _tuning_patches.patches_sum(1, 196, 768) is _tuning_patches.BIAS_SUM
    assert _tuning_patches.patches_sum(1, 7, 768 * 768) is _tuning_patches.PARTS_SUM


def test_prefix_rows_stay_out_of_the_weight_and_bias():
    image, weight = torch.randn(3, 3, 8, 8, device=DEVICE), torch.randn(20, 3, 4, 4, device=DEVICE)
    dy = torch.randn(3, 6, 20, device=DEVICE)
    spoiled = dy.clone()
    spoiled[:, :2] = math.nan
    want = patch_embed.backward(dy, image, weight, None, None, 6, 2, True)
    got = patch_embed.backward(spoiled, image, weight, None, None, 6, 2, True)
    for w, g in zip(want[:3], got[:3], strict=True):
        assert torch.equal(w, g)
    assert got[4].isnan().all()
    assert torch.equal(got[3][2:], want[3][2:])


def test_far_strides():
    """Three images, and three gradients, 2^30 elements apart: a few pages are touched, the rest costs no memory.

    The strides fit 32 bits, and twice a stride does not.
    """
    far = 1 << 30
    pixels = torch.empty(2 * far + 1024, dtype=torch.uint8, device=DEVICE).as_strided((3, 3, 8, 8), (far, 64, 8, 1))
    pixels.copy_(torch.randint(0, 256, (3, 3, 8, 8)))
    dy = torch.empty(2 * far + 1024, dtype=torch.float16, device=DEVICE).as_strided((3, 5, 16), (far, 16, 1))
    dy.copy_(torch.randn(3, 5, 16))
    weight = torch.randn(16, 3, 4, 4, device=DEVICE).half()
    near = pixels.contiguous()
    parameters = (weight, None, None, weight[:1, 0, 0].repeat(1, 4), SCALE, SHIFT)
    assert torch.equal(patch_embed.forward(pixels, *parameters), patch_embed.forward(near, *parameters))
    got = patch_embed.backward(dy, pixels, weight, SCALE, SHIFT, 5, 1, False)
    for g, w in zip(got, patch_embed.backward(dy.contiguous(), near, weight, SCALE, SHIFT, 5, 1, False), strict=True):
        assert torch.equal(g, w)
    image = near.half()
    got = patch_embed.backward(dy, image, weight, SCALE, SHIFT, 5, 1, True)[0]
    assert torch.equal(got, patch_embed.backward(dy.contiguous(), image, weight, SCALE, SHIFT, 5, 1, True)[0])


def test_wide_offsets_are_the_same_numbers(monkeypatch):
    """The code for images beyond 2^31 elements, on small ones."""
    image, weight = random(3, 3, 8, 8, dtype=torch.float32), torch.randn(16, 3, 4, 4, device=DEVICE)
    table, dy = random(5, 16, dtype=torch.float32), random(3, 5, 16, dtype=torch.float32)
    tokens = patch_embed.forward(image, weight, None, table, table[:1], SCALE, SHIFT)
    grads = patch_embed.backward(dy, image, weight, SCALE, SHIFT, 5, 1, True)
    monkeypatch.setattr(patch_embed, "_wide", lambda *_: True)
    assert torch.equal(patch_embed.forward(image, weight, None, table, table[:1], SCALE, SHIFT), tokens)
    for g, w in zip(patch_embed.backward(dy, image, weight, SCALE, SHIFT, 5, 1, True), grads, strict=True):
        assert torch.equal(g, w)


@each_dtype
def test_no_images_no_gradient(dtype):
    weight, dy = torch.randn(16, 3, 4, 4, device=DEVICE).to(dtype), torch.empty(0, 5, 16, dtype=dtype, device=DEVICE)
    image = torch.empty(0, 3, 8, 8, dtype=dtype, device=DEVICE)
    dimage, *rest = run(patch_embed, dy, image, weight, None, None, 5, 1, True, entry="backward")
    assert dimage.shape == image.shape
    for grad, shape in zip(rest, (weight.shape, (16,), (5, 16), (1, 16)), strict=True):
        assert torch.equal(grad, torch.zeros(shape, dtype=dtype, device=DEVICE))


def test_an_image_without_patches_is_refused():
    weight = torch.randn(16, 3, 4, 4, device=DEVICE)
    reason = patch_embed.why_not(torch.randn(2, 3, 0, 8, device=DEVICE), weight, *[None] * 5)
    assert "at least one patch" in reason
