"""The CUDA C++ patch embedding: pixels to rows, the library's product, rows to tokens, on the emulator and a GPU."""

import pytest
import test_patch_embed as cases
import torch
from harness import check
from test_patch_embed import LAYOUTS, MEAN, STD, eager, sample

from fastvit import backends, ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATCHES = [(1, 1), (4, 4), (14, 14), (16, 16), (5, 3)]
TOKENS = [(0, None), (0, "patches"), (1, "all"), (5, "patches"), (5, None)]


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(cuda_place, dtype, patch):
    """Every patch with every kind of tokens; a width of whole vectors and an odd one."""
    for number, (prefix, positions) in enumerate(TOKENS):
        dim, bias = (40, 33, 264)[number % 3], number % 2 == 0
        tensors = sample(2, 3, (2, 3), patch, dim, prefix, positions, bias)
        check(cuda_place, dtype, ops.patch_embed, eager, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("patch", [(8, 8), (14, 14), (5, 3)], ids=str)
def test_layouts(cuda_place, patch, layout):
    for dtype, channels in zip(DTYPES, (1, 3, 4), strict=True):
        cases.test_patches_and_layouts(cuda_place, dtype, patch, channels, layout)


@pytest.mark.parametrize("pixels", ["rows of pixels", "planes", "cropped rows", "mirrored"])
@pytest.mark.parametrize("patch", [(4, 4), (14, 14), (16, 16), (5, 3)], ids=str)
def test_photographs(cuda_place, patch, pixels):
    for channels in (1, 3):
        cases.test_decoded_photographs(cuda_place, channels, patch, pixels)


def test_normalisation(cuda_place):
    cases.test_uint8_and_normalisation(cuda_place)
    cases.test_float_normalisation_differentiates_the_image(cuda_place)
    cases.test_normalisation_compiles_in_one_graph_and_holds_no_state(cuda_place)
    cases.test_registered_with_pixel_factors(cuda_place)


def test_pixels_are_rounded_once(cuda_place):
    """A weight of one pixel shows the patches as they were multiplied."""
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scale, shift = 1 / (255 * STD[0]), -MEAN[0] / STD[0]
    for dtype in DTYPES:
        y = backends.implementation("patch_embed", "cuda").forward(
            image.to(cuda_place.device), torch.ones(1, 1, 1, 1, dtype=dtype, device=cuda_place.device),
            None, None, None, [scale], [shift],
        )  # fmt: skip
        want = (image.float() * torch.tensor(scale) + torch.tensor(shift)).to(dtype).flatten()
        torch.testing.assert_close(y.cpu().flatten(), want, rtol=torch.finfo(torch.float32).eps * 2, atol=1e-6)


def test_positions_and_prefix_off_16_bytes(cuda_place):
    def through(function):
        def late(pos_embed, prefix, **rest):
            tables = {"pos_embed": pos_embed, "prefix": prefix}
            off = {k: torch.cat([t[..., :1], t], -1)[..., 1:] for k, t in tables.items()}
            return function(**rest, **off)

        return late

    for dtype in DTYPES:
        check(cuda_place, dtype, through(ops.patch_embed), through(eager), sample(positions="all", prefix=2))


def test_more_images_than_a_launch_begins_with(cuda_place):
    tensors = sample(2300, 1, (1, 1), (2, 2), 8)
    check(cuda_place, torch.float32, ops.patch_embed, eager, tensors, gradients=False)


def test_views_empty_written_and_incoming_gradients(cuda_place, nan_filled):
    cases.test_views_equal_contiguous(cuda_place)
    cases.test_empty_and_written(cuda_place, None)
    cases.test_same_bits_again(cuda_place)
    cases.test_incoming_gradients_of_any_layout(cuda_place, torch.bfloat16)


def test_many_channels_are_refused_with_factors(cuda_place):
    image, weight = torch.zeros(1, 17, 2, 2, device=cuda_place.device), torch.zeros(4, 17, 2, 2)
    launcher = backends.implementation("patch_embed", "cuda")
    weight = weight.to(cuda_place.device)
    assert "at most 16 channels" in launcher.why_not(image, weight, None, None, None, [1.0] * 17, [0.0] * 17)
    assert launcher.why_not(image, weight, None, None, None, None, None) is None
