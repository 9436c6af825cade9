"""transformers' models accelerated: what the tables of tests/compatibility do not ask."""

import copy

import pytest
import torch
from models import randomize
from tolerances import assert_close
from torch import nn

import fastvit

transformers = pytest.importorskip("transformers")
from transformers.models.vit.modeling_vit import ViTLayer  # noqa: E402

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
}


def small_vit(**options):
    config = transformers.ViTConfig(**{**SIZES, "layer_norm_eps": 1e-6, **options})
    return randomize(transformers.ViTModel(config, add_pooling_layer=False)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


def run(model, x, **options):
    return model(x, **options).last_hidden_state


def fused_layers(model):
    return [row.name for row in fastvit.report(model) if row.fused and row.module == "ViTLayer"]


def test_maps_are_right_whatever_the_attention_implementation(x):
    model = small_vit()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    want = eager(x, output_attentions=True, output_hidden_states=True)
    exact = copy.deepcopy(eager).double()(x.double(), output_attentions=True, output_hidden_states=True)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        fastvit.accelerate(model)
        got = model(x, output_attentions=True, output_hidden_states=True)
        assert len(got.attentions) == 3 and len(got.hidden_states) == 4
        for i in range(3):
            assert_close(f"map {i}", got.attentions[i], exact.attentions[i], want.attentions[i])
            assert_close(f"state {i}", got.hidden_states[i + 1], exact.hidden_states[i + 1], want.hidden_states[i + 1])


def test_collecting_outputs_once_does_not_end_fusion(x):
    model = fastvit.accelerate(small_vit())
    want = run(model, x)
    model(x, output_hidden_states=True)
    assert len(fused_layers(model)) == 3
    seen = []
    inside = model.layers[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    assert len(fused_layers(model)) == 2
    assert torch.allclose(run(model, x), want, atol=1e-4)
    assert seen == [1]
    inside.remove()
    assert len(fused_layers(model)) == 3


def test_a_late_hook_leaves_the_other_parts_fused(x, monkeypatch):
    model = fastvit.accelerate(small_vit())
    want, calls = run(model, x), []
    attention = fastvit.ops.attention
    monkeypatch.setattr(fastvit.ops, "attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    model.layers[0].mlp.fc1.register_forward_hook(lambda *_: None)
    assert torch.allclose(run(model, x), want, atol=1e-4)
    assert calls == [1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(x, reentrant):
    model = fastvit.accelerate(small_vit()).train()
    x.requires_grad_()

    def gradients():
        model.zero_grad()
        run(model, x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want, calls = gradients(), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    handle = model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    got = gradients()
    handle.remove()
    assert calls == [1]
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_padding_mask_and_arguments_that_only_the_layer_understands(x):
    layer = small_vit().layers[0]
    tokens, mask = torch.randn(2, 17, 48), torch.rand(2, 1, 1, 17) > 0.4
    want = layer(tokens, mask)
    fastvit.accelerate(layer)
    assert torch.allclose(layer(tokens, mask), want, atol=1e-5)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.allclose(layer(tokens, attention_mask=additive), want, atol=1e-5)
    fastvit.integrations.transformers.register()
    layer.attention.config._attn_implementation = "fastvit"
    with pytest.raises(ValueError, match="softcap"):  # from the interface that the layer itself calls
        layer(tokens, softcap=3.0)


def test_what_is_not_understood_stays_eager_and_says_why(x):
    class Louder(ViTLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 2

    class Adapted(nn.Linear):
        pass

    model = small_vit()
    model.layers[0].__class__ = Louder
    model.layers[1].attention.k_proj.__class__ = Adapted
    model.layers[2].mlp.activation_fn = nn.SiLU()
    want = run(model, x)
    rows = {row.name: row for row in fastvit.report(fastvit.accelerate(model))}
    assert "k_proj is a Adapted, not a torch.nn.Linear" in rows["layers.1"].reason
    assert "activation SiLU has no fused form" in rows["layers.2"].reason
    assert "layers.0" not in rows
    assert rows["layers.0.attention"].fused
    assert torch.allclose(run(model, x), want, atol=1e-4)
    with pytest.raises(RuntimeError, match="strict"):
        fastvit.accelerate(model, strict=True)


def test_changed_weights_of_queries_are_seen(x):
    """At inference the three weights are kept as one, which has to follow each of them."""
    model = fastvit.accelerate(small_vit())
    change = torch.randn(48, 48)
    with torch.no_grad():
        run(model, x)
        for projection in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(model.layers[1].attention, projection).weight
            before = run(model, x)
            weight.add_(change)
            after = run(model, x)
            assert not torch.allclose(after, before, atol=1e-3)
            weight.data -= change
            assert torch.allclose(run(model, x), before, atol=1e-3)
        state = copy.deepcopy(model.state_dict())
        twin = copy.deepcopy(model)
        for p in model.parameters():
            p.zero_()
        assert torch.allclose(run(twin, x), before, atol=1e-3)
        model.load_state_dict(state)
        assert torch.allclose(run(model, x), before, atol=1e-3)
        assert fastvit.report(model).packed_bytes > 0
        assert fastvit.report(fastvit.restore(model)).packed_bytes == 0


def test_int8_and_weights_in_one_copy(x):
    if not fastvit.is_available("cpu"):
        pytest.skip("GPU: no cpu backend here")
    model = small_vit()
    want = run(model, x)
    report = fastvit.quantize(fastvit.accelerate(model), calibration=x, threshold=float("inf"))
    assert [row.name for row in report][:2] == [
        "layers.0.attention.q_proj+attention.k_proj+attention.v_proj",
        "layers.0.attention.o_proj",
    ]
    with torch.no_grad():
        error = (run(model, x) - want).norm() / want.norm()
    assert 1e-4 < error < 0.05
    with pytest.raises(ValueError, match="queries, keys and values in weights of their own"):
        fastvit.accelerate(model, release_original=True)


def test_backbone_inside_a_larger_model(x):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = small_vit(), nn.Linear(48, 4)

        def forward(self, x):
            return self.head(run(self.backbone, x)[:, 0])

    model = Detector()
    want = model(x)
    fastvit.accelerate(model)
    assert len(fused_layers(model)) == 3
    assert torch.allclose(model(x), want, atol=1e-4)
    assert torch.equal(fastvit.restore(model)(x), want)
