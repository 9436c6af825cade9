"""attention_maps of timm's other blocks: rotary positions, relative biases, gated MLPs, norms behind, parallel MLPs."""

import copy

import pytest
import torch
from models import images
from test_maps import DTYPES, check
from test_timm import CASES, model_of

import fastvit

KNOWN = [name for name in CASES if name not in ("parallel_things",)]


def softmax(model, x):
    """What unfused attention hands to its dropout, of each block."""
    model, found = fastvit.restore(copy.deepcopy(model)), []
    for module in model.blocks.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda module, args, output: found.append(args[0]))
    with torch.no_grad():
        model(x)
    return found


@DTYPES
@pytest.mark.parametrize("name", KNOWN)
def test_every_block(name, dtype):
    check(name, model_of(name), softmax, images(), dtype, accelerated=True)


@pytest.mark.parametrize("name", ["eva_rope", "rope_mixed", "beit_both", "relpos", "parallel", "post_norm"])
def test_a_few_rows_and_heads(name):
    model, x = model_of(name), images()
    every = fastvit.attention_maps(model, x, queries="all")
    few = fastvit.attention_maps(fastvit.accelerate(model), x, queries=[9, 0], heads=[2, 1])
    for got, want in zip(few, every, strict=True):
        torch.testing.assert_close(got, want[:, [2, 1]][:, :, [9, 0]])


@pytest.mark.parametrize("name", ["eva_rope", "dinov3", "beit", "deit"])
def test_patches_by_their_place(name):
    model, x = model_of(name), images()
    prefix = model.num_prefix_tokens
    patch, row = (fastvit.attention_maps(model, x, 1, queries)[0] for queries in ([(2, 1)], prefix + 9))
    assert torch.equal(patch, row)
    assert patch.shape[-1] == prefix + 16
    assert fastvit.attention_maps(model, x, 1)[0].shape[2] == 1
