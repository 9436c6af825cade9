"""Position tables on another grid: resized by the source's own function, prefix rows moved where the model has them."""

import copy

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from checkpoint_models import REGISTERS, hf, ours, output, timm_vit, tv_vit, vision, vit_hf, write
from models import images, timm
from tolerances import assert_close

from fastvit import CheckpointError, load_checkpoint

POSITIONS = {
    "timm": (timm_vit, ours, (24, 48)),
    "timm registers": (lambda: timm_vit(**REGISTERS), lambda **o: ours(**{**REGISTERS, **o}), (48, 24)),
    "transformers": (vit_hf, ours, (48, 56)),
    "transformers registers": (
        lambda: hf("Dinov2WithRegistersModel"),
        lambda **o: ours(**{**REGISTERS, **o}),
        (24, 16),
    ),
    "torchvision": (tv_vit, ours, (48, 48)),
}


def as_the_source_resizes(name, source, side):
    """The position table by the source library's own function."""
    if name.startswith("timm"):
        state = dict(source.state_dict())
        options = REGISTERS if "registers" in name else {}
        model = timm_vit(**{**options, "img_size": side})
        return timm.models.vision_transformer.checkpoint_filter_fn(state, model)["pos_embed"]
    if name == "torchvision":
        state = {key: value.clone() for key, value in source.state_dict().items()}
        return vision.interpolate_embeddings(side[0], 8, state)["encoder.pos_embedding"]
    embeddings = source.vit.embeddings if name == "transformers" else source.embeddings
    tokens = torch.zeros(1, 1 + side[0] // 8 * (side[1] // 8), 48)
    table = embeddings.interpolate_pos_encoding(tokens, *side).detach()
    return table[:, 1:] if "registers" in name else table


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_resized_as_the_source_does(name, tmp_path):
    make, target, side = POSITIONS[name]
    source = make()
    model = load_checkpoint(target(img_size=side), write(source, tmp_path))
    want = as_the_source_resizes(name, source, side)
    assert torch.allclose(model.pos_embed, want, atol=1e-6)
    eager = load_checkpoint(target(img_size=side), write(source, tmp_path), interpolation="original").pos_embed
    assert not torch.allclose(eager, want, atol=1e-3)


def test_positions_of_dinov2_take_their_scale_from_sizes_and_a_tenth(tmp_path):
    source = timm_vit(init_values=0.1, num_classes=0)
    state = {**source.state_dict(), "mask_token": torch.zeros(1, 48)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    model = load_checkpoint(ours(init_values=0.1, num_classes=0, img_size=(48, 72)), tmp_path / "a.safetensors")
    grid = state["pos_embed"][:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    want = F.interpolate(grid, scale_factor=(6.1 / 4, 9.1 / 4), mode="bicubic", antialias=False)
    assert want.shape[-2:] == (6, 9)
    assert torch.equal(model.pos_embed[:, 1:], want.permute(0, 2, 3, 1).reshape(1, 54, 48))


def test_a_table_of_equal_count_and_another_shape(tmp_path):
    path = write(timm_vit(), tmp_path)
    model = ours(img_size=(16, 64))
    before = model.pos_embed.detach().clone()
    with pytest.raises(CheckpointError, match=r"may be 4 x 4 or, as in the model, 2 x 8: say which"):
        load_checkpoint(model, path)
    assert torch.equal(model.pos_embed, before)
    load_checkpoint(model, path, source_grid=(4, 4))
    source = safetensors.torch.load_file(path)["pos_embed"]
    want = timm.layers.resample_abs_pos_embed(source, (2, 8), (4, 4))
    assert torch.equal(model.pos_embed, want)
    assert torch.equal(load_checkpoint(model, path, source_grid=(2, 8)).pos_embed, source)
    with pytest.raises(CheckpointError, match=r"source_grid \(3, 5\) does not fit"):
        load_checkpoint(model, path, source_grid=(3, 5))


def test_positions_of_prefix_tokens_move_into_the_tokens_and_out(tmp_path):
    """With and without rows for the class token: the function stays."""
    x = images()
    for source, target in (
        (timm_vit(), ours(no_embed_class=True)),
        (timm_vit(no_embed_class=True), ours()),
        (timm_vit(reg_tokens=2), ours(reg_tokens=2, no_embed_class=True)),
    ):
        load_checkpoint(target, write(source, tmp_path))
        exact = output(copy.deepcopy(source).double(), x.double())
        assert_close("logits", output(target, x), exact, output(source, x))
