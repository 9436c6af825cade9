"""torchvision's Vision Transformer accelerated: what the tables of tests/compatibility do not ask."""

import copy

import pytest
import torch
from models import randomize
from torch import nn

import fastvit

torchvision = pytest.importorskip("torchvision")
from torchvision.models import vision_transformer as vit  # noqa: E402


def small_vit(**options):
    return randomize(vit.VisionTransformer(32, 8, 3, 3, 48, 80, num_classes=11, **options)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


def rows_of(model):
    return {row.name: row for row in fastvit.report(model)}


def test_everything_is_fused():
    model = fastvit.accelerate(small_vit())
    rows = rows_of(model)
    assert all(rows[f"encoder.layers.encoder_layer_{i}"].fused for i in range(3))
    assert rows["conv_proj"].fused and rows["encoder.ln"].fused
    assert rows["encoder.layers"].ops.keys() == {"encoder"} or not fastvit.is_available("cpu")


def test_training_with_dropouts(x):
    """Not the elements that eager drops: MultiheadAttention's output has its tokens first in memory."""
    model = fastvit.accelerate(small_vit(dropout=0.3, attention_dropout=0.2)).train()
    first = model(x)
    assert not torch.equal(model(x), first)
    first.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.allclose(model(x), fastvit.restore(model)(x), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: setattr(b, "self_attention", nn.MultiheadAttention(48, 3, kdim=48, vdim=48, bias=False)), "batch"),
        (lambda b: b.mlp.__setitem__(1, nn.SiLU()), "activation SiLU has no fused form"),
        (lambda b: setattr(b, "ln_2", nn.RMSNorm(48)), "ln_2: RMSNorm is not a LayerNorm"),
        (lambda b: setattr(b, "dropout", nn.AlphaDropout(0.1)), "dropout is a AlphaDropout"),
    ],
)
def test_what_is_not_understood_stays_eager_and_says_why(x, change, words):
    model = small_vit()
    change(model.encoder.layers[1])
    want = randomize(model).eval()(x)
    rows = rows_of(fastvit.accelerate(model))
    assert words in rows["encoder.layers.encoder_layer_1"].reason
    assert torch.allclose(model(x), want, atol=1e-4)
    assert torch.equal(fastvit.restore(model)(x), want)


def test_images_that_do_not_fit_get_torchvisions_own_error(x):
    model = fastvit.accelerate(small_vit())
    with pytest.raises(AssertionError, match="Wrong image height"):
        model(torch.randn(1, 3, 40, 32))
    with pytest.raises(AssertionError, match="batch_size, seq_length, hidden_dim"):
        model.encoder.layers[0](torch.randn(17, 48))


def test_int8_and_weights_in_one_copy(x):
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: no cpu backend here")
    model = small_vit()
    want, state = model(x), copy.deepcopy(model.state_dict())
    report = fastvit.quantize(fastvit.accelerate(model), calibration=x, threshold=float("inf"))
    assert report[0].name == "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    with torch.no_grad():
        assert 1e-4 < (model(x) - want).norm() / want.norm() < 0.05
        fastvit.accelerate(fastvit.restore(model), release_original=True)
        assert fastvit.report(model).released_bytes == 3 * 4 * (4 * 48 * 48 + 2 * 48 * 80)
        assert torch.allclose(model(x), want, atol=1e-4)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(fastvit.restore(model)(x), want)
