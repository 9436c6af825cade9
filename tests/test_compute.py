"""Multiply-adds: the published figures of ViTs and hybrids, closed formulas, and models left as they were."""

import pytest
import torch
from models import small_timm, timm
from torch import nn

import fastvit
from fastvit import compute, compute_chart
from fastvit.benchmarks import cases
from fastvit.config import ViTConfig

OURS = {
    "vit_tiny_patch16_224": 1.254,
    "vit_small_patch16_224": 4.599,
    "vit_base_patch32_224": 4.409,
    "vit_base_patch16_224": 17.564,
    "vit_large_patch16_224": 61.555,
    "vit_huge_patch14_224": 167.295,
    "vit_base_patch16_384": 55.484,
}
TIMMS = {"vit_small_r26_s32_224": 3.464, "vit_base_r50_s16_384": 67.156}


@pytest.mark.parity
@pytest.mark.parametrize(("name", "gmacs"), [*OURS.items(), *TIMMS.items()])
def test_published_figures(name: str, gmacs: float) -> None:
    side = int(name.rpartition("_")[2])
    with torch.device("meta"):
        model = fastvit.create_model(name, weight_init="skip") if name in OURS else timm.create_model(name)
    row = compute.row("it", "ViT", model, torch.empty(1, 3, side, side, device="meta"))
    assert row.gmacs == pytest.approx(gmacs, rel=1e-3)
    assert (row.height, row.width) == (side, side)


def test_an_odd_model_by_its_formula() -> None:
    odd = {"img_size": (40, 24), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    config = ViTConfig(**odd, mlp_ratio=1.7, reg_tokens=2)
    model = fastvit.VisionTransformer(config)
    assert compute.macs(model, torch.empty(1, 3, 40, 24)) == cases.macs(config)


def test_products_are_counted_by_hand() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert compute.macs(Attention(), torch.empty(1, 5, 11, 6)) == 2 * 5 * 11 * 11 * 6
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 3 * 3, 5))
    assert compute.macs(net.eval(), torch.empty(1, 3, 7, 7)) == 9 * 4 * 27 + 36 * 5


def test_the_model_stays_as_it_is_and_how_it_runs_plays_no_part() -> None:
    model, x = small_timm(), torch.randn(1, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = compute.macs(model, x)
    expected = model(x)
    assert compute.macs(fastvit.accelerate(model), x) == plain == compute.macs(model.half(), x.half()) > 0
    model = fastvit.restore(model.float())
    assert all(torch.equal(tensor, before[name].half().float()) for name, tensor in model.state_dict().items())
    assert not model.training and all(p.device.type == "cpu" for p in model.parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


def test_a_forward_that_looks_at_values_is_refused() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    with pytest.raises(ValueError, match="Looks cannot run on shapes alone"):
        compute.macs(Looks(), torch.ones(1, 3, 8, 8))


@pytest.mark.parity
@pytest.mark.parametrize(("label", "name"), [("R50x1", "50x1"), ("R101x1", "101x1"), ("R152x2", "152x2")])
def test_the_papers_resnets_are_timms(label: str, name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"resnetv2_{name}_bit", num_classes=1000)
        ours = compute._resnet(timm, *compute._RESNETS[label])
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_papers_models_with_and_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, kept in (("_RESNETS", "R50x1"), ("_HYBRIDS", "R26+S/32"), ("_VITS", "Ti/16")):
        monkeypatch.setattr(compute, table, {kept: getattr(compute, table)[kept]})
    rows = list(compute.papers_rows(timm))
    assert [(row.name, row.family) for row in rows] == [("R50x1", "ResNet"), ("R26+S/32", "hybrid"), ("Ti/16", "ViT")]
    assert [row.parameters for row in rows] == [25_549_352, 36_431_912, 5_717_416]
    assert rows[0].gmacs == pytest.approx(4.09, rel=1e-2)  # a ResNet-50's, whose figure is published widely
    monkeypatch.setattr(compute, "PRESETS", {"vit_tiny_patch16_224": None})
    without = list(compute.papers_rows())
    assert [row if isinstance(row, tuple) else row.name for row in without] == [
        ("R50x1", "needs timm, whose architecture it is"),
        ("R26+S/32", "needs timm, whose architecture it is"),
        "Ti/16",
    ]


def test_every_model_has_its_name_on_the_chart_and_no_two_cover_each_other() -> None:
    close = [compute.Row(f"M{i}", "ViT", 224, 224, 80_000_000 + 4_000_000 * i, int(17e9 + 1e9 * i)) for i in range(4)]
    others = [compute.Row("R50", "ResNet", 224, 224, 25_000_000, int(4e9))]
    asked = compute.Row("mine", "ViT", 384, 384, 86_000_000, int(55e9), asked=True)
    figure = compute_chart.chart([*close, *others, asked])
    (axes,) = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == ["M0", "M1", "M2", "M3", "R50"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ResNet", "ViT", "mine"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
