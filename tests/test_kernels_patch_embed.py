"""The patch_embed launcher: what it reads and writes, layouts, pixel types."""

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, arena, double, each_dtype, random, run
from tolerances import assert_close

pytest.importorskip("triton")

from fastvit.kernels import patch_embed


@each_dtype
@pytest.mark.parametrize("patch", [(16, 16), (3, 5)])
@pytest.mark.parametrize("prefixed_positions", [True, False])
def test_patch_embed(dtype, patch, prefixed_positions):
    height, width = 2 * patch[0], 3 * patch[1]
    weight = arena(torch.randn(40, 3, *patch).to(dtype) / 20).contiguous()
    bias, prefix = random(40, dtype=dtype), random(2, 40, dtype=dtype)
    table = random(8 if prefixed_positions else 6, 40, dtype=dtype)
    scale, shift = [0.02, 0.013, 0.008], [-2.1, 0.3, 1.7]

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
    tokens = run(patch_embed, pixels, weight, bias, table, prefix, scale, shift)
    scale, shift = (torch.tensor(values, device=DEVICE)[:, None, None] for values in (scale, shift))
    image = (pixels * scale + shift).to(dtype)
    tensors = (image, weight, bias, prefix, table)
    assert_close("uint8", tokens, mathematics(*double(*tensors)), mathematics(*tensors))
    bare = patch_embed.forward(floats, weight, None, None, None, None, None)
    exact, eager = (F.conv2d(*t, stride=patch).flatten(2).mT for t in (double(floats, weight), (floats, weight)))
    assert_close("bare", bare, exact, eager)
