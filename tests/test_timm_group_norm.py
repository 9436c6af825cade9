"""GroupNorm with its activation in timm's ResNet stems: fused, reported, restored, and timm's own semantics kept."""

import pytest
import torch
from torch import nn

import fastvit

timm = pytest.importorskip("timm")
GroupNormAct = timm.layers.GroupNormAct


class Stem(nn.Module):
    """Two norms of a hybrid's stem, of which the second is followed by no activation, and an MLP that is fused too."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.first = GroupNormAct(64, 32, **options)
        self.second = GroupNormAct(64, 32, apply_act=False)
        self.mlp = timm.layers.Mlp(64, 32)
        for norm in (self.first, self.second):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        return self.mlp(self.second(self.first(self.conv(x))).mean((2, 3)))


def results(model, x):
    leaves = [x, *model.parameters()]
    y = model(x)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))


def rows(model):
    return {row.name: row for row in fastvit.report(model)}


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU], ids=lambda act: act.__name__)
def test_fused_reported_and_restored(act):
    model, x = Stem(act_layer=act), torch.randn(2, 3, 12, 13, requires_grad=True)
    before = results(model, x)
    fastvit.accelerate(model)
    found = rows(model)
    assert [*found["first"].ops] == [*found["second"].ops] == ["group_norm"]
    for backend in ("auto", "cpu"):
        if backend == "auto" or fastvit.is_available(backend):
            with fastvit.backend(backend):
                for got, want in zip(results(model, x), before, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                with torch.no_grad():
                    torch.testing.assert_close(model(x), before[0], rtol=1e-4, atol=1e-5)
    fastvit.restore(model)
    assert all(torch.equal(got, want) for got, want in zip(results(model, x), before, strict=True))


def test_what_it_leaves_alone_and_why():
    class Doubled(GroupNormAct):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Stem(drop_layer=nn.Dropout)
    model.second = Doubled(64, 32)
    found = rows(fastvit.accelerate(model))
    assert "drop is a Dropout" in found["first"].reason
    assert "second" not in found or not found["second"].fused
    model = Stem()
    model.first._fast_norm = True
    found = rows(fastvit.accelerate(model))
    assert "fast norm" in found["first"].reason
    assert not rows(fastvit.accelerate(Stem(), patch_embed=False))["first"].fused


def test_a_hook_on_the_activation_is_called():
    model, x, seen = fastvit.accelerate(Stem()), torch.randn(1, 3, 9, 9), []
    model.first.act.register_forward_hook(lambda *args: seen.append(True))
    model(x)
    assert seen == [True]


def test_a_hybrid_of_timm():
    model = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=3).eval()
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, GroupNormAct)):
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(0, 0.2, generator=generator)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = model(x)
        fastvit.accelerate(model)
        assert any(row.module == "GroupNormAct" and "group_norm" in row.ops for row in fastvit.report(model))
        torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4)
        assert torch.equal(fastvit.restore(model)(x), want)
