"""transformers with attn_implementation="fastvit" against eager attention: numbers, masks, gradients, maps, errors."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from models import randomize
from tolerances import assert_close

from fastvit import ops
from fastvit.integrations import attention_interface
from fastvit.integrations.transformers import register

transformers = pytest.importorskip("transformers")
from transformers import AttentionInterface  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask  # noqa: E402

SIZE = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**SIZE, "image_size": 24, "patch_size": 8}  # nine patches
TEXT = {
    **SIZE,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
BIAS = {**IMAGE, "layer_scale_init_value": 0.5}
LLAMA = {**TEXT, "num_key_value_heads": 2}
PIXELS = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(4, 39, (3, 7), generator=torch.Generator().manual_seed(2))
IDS[:, -1] = 39  # the highest one is where CLIP pools


def padding(tokens):
    """The last tokens of the second and third sample are none; the first ones of texts, which are read causally."""
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[1, tokens - 2 :] = 0
    mask[2, tokens // 2 :] = 0
    return mask


def image_case(config, tokens, **options):
    return config, options, {"pixel_values": PIXELS, **({"attention_mask": padding(tokens)} if tokens else {})}


def text_case(config, **options):
    return config, options, {"input_ids": IDS, "attention_mask": padding(7).flip(1)}


CASES = {  # config class -> its options, the model's, and inputs with a padding mask wherever the model takes one
    "ViT": image_case("ViTConfig", 10, **IMAGE),
    "DeiT": image_case("DeiTConfig", 11, **IMAGE),
    "DINOv2": image_case("Dinov2Config", 10, **{**IMAGE, "mlp_ratio": 2}),
    "DINOv2 with registers": image_case("Dinov2WithRegistersConfig", 14, **{**IMAGE, "mlp_ratio": 2}),
    "DINOv3": image_case("DINOv3ViTConfig", 0, num_register_tokens=2, **IMAGE),
    "BEiT": image_case("BeitConfig", 10, use_relative_position_bias=True, **BIAS),
    "BEiT, one bias": image_case("BeitConfig", 10, use_shared_relative_position_bias=True, **BIAS),
    "CLIP vision": image_case("CLIPVisionConfig", 0, **IMAGE),
    "CLIP text": text_case("CLIPTextConfig", **TEXT),
    "CLIP": ("CLIPConfig", {"vision_config": IMAGE, "text_config": TEXT}, {}),
    "SigLIP vision": image_case("SiglipVisionConfig", 0, **IMAGE),
    "SigLIP text": text_case("SiglipTextConfig", **TEXT),
    "Llama, two query heads to a key": text_case("LlamaConfig", **LLAMA),
}
CASES["CLIP"][2].update(CASES["CLIP text"][2], pixel_values=PIXELS)


def exact_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """softmax(scaling · QKᵀ + mask) V, nothing rounded on the way."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    weights = torch.softmax(scores if attention_mask is None else scores + attention_mask, -1)
    return (weights @ value).transpose(1, 2), weights


@pytest.fixture(autouse=True)
def registered():
    register()
    AttentionInterface.register("exact", exact_attention)
    AttentionMaskInterface.register("exact", eager_mask)


def build(case, implementation="eager"):
    name, options, inputs = CASES[case]
    config = getattr(transformers, name)(**options)
    model = getattr(transformers, name.replace("Config", "Model"))
    return randomize(model._from_config(config, attn_implementation=implementation)).eval(), inputs


def exact_copy(model):
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("exact")
    return model


def cast(inputs, dtype):
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def outputs_of(model, inputs):
    """What a model says, floating-point tensors alone; padded tokens say nothing."""
    result = model(**inputs)
    found = {name: t for name, t in result.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    hidden, mask = found.get("last_hidden_state"), inputs.get("attention_mask")
    if hidden is not None and mask is not None:
        found["last_hidden_state"] = hidden * mask[..., None].to(hidden)
    return {name: t for name, t in found.items() if name != "loss"}


def run(model, inputs, dys=None):
    """Outputs and gradients of all parameters, for upstream gradients that are the same for every model."""
    model.zero_grad()
    found = outputs_of(model, inputs)
    if dys is None:
        generator = torch.Generator().manual_seed(3)
        dys = {name: torch.randn(t.shape, generator=generator) for name, t in found.items()}
    sum((t * dys[name].to(t)).sum() for name, t in found.items()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in found.items()}, grads


@pytest.mark.parametrize("case", CASES)
def test_equals_eager_with_its_padding_mask(case):
    model, inputs = build(case)
    eager, eager_grads = run(model, inputs)
    exact, exact_grads = run(exact_copy(model), cast(inputs, torch.float64))
    model.set_attn_implementation("fastvit")
    ours, grads = run(model, inputs)
    assert ours
    assert grads.keys() == eager_grads.keys()
    for name, t in ours.items():
        assert_close(name, t, exact[name], eager[name])
    for name, grad in grads.items():
        assert_close(name, grad, exact_grads[name], eager_grads[name], gradient=True)
    for name in grads:
        if "relative_position_bias_table" in name:
            assert grads[name].abs().max() > 0


@pytest.mark.parametrize("case", ["BEiT", "CLIP"])
def test_bfloat16(case):
    model, inputs = build(case)
    model.bfloat16()
    inputs = cast(inputs, torch.bfloat16)
    eager, exact = outputs_of(model, inputs), outputs_of(exact_copy(model), cast(inputs, torch.float64))
    model.set_attn_implementation("fastvit")
    for name, t in outputs_of(model, inputs).items():
        assert_close(name, t, exact[name], eager[name])


@pytest.mark.parametrize("case", ["ViT", "BEiT", "CLIP text"])
def test_without_our_masks_transformers_would_drop_the_padding(case, monkeypatch):
    model, inputs = build(case)
    eager = outputs_of(model, inputs)["last_hidden_state"]
    model.set_attn_implementation("fastvit")
    torch.testing.assert_close(outputs_of(model, inputs)["last_hidden_state"], eager, rtol=1e-4, atol=1e-4)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "fastvit")
    assert not torch.allclose(outputs_of(model, inputs)["last_hidden_state"], eager, rtol=1e-2, atol=1e-2)


def maps_of(result):
    towers = [result, *(getattr(result, f"{tower}_model_output", None) for tower in ("vision", "text"))]
    return [m for tower in towers for m in (getattr(tower, "attentions", None) or ())]


@pytest.mark.parametrize("case", ["ViT", "DINOv3", "BEiT", "CLIP", "Llama, two query heads to a key"])
def test_output_attentions_are_eagers_maps(case):
    model, inputs = build(case)
    eager = model(**inputs, output_attentions=True)
    exact = maps_of(exact_copy(model)(**cast(inputs, torch.float64), output_attentions=True))
    model.set_attn_implementation("fastvit")
    plain, ours = model(**inputs), model(**inputs, output_attentions=True)
    assert maps_of(plain) == []
    assert len(maps_of(ours)) == len(maps_of(eager)) == (4 if case == "CLIP" else 2)
    for i, (got, want, base) in enumerate(zip(maps_of(ours), exact, maps_of(eager), strict=True)):
        rows = slice(None)
        if "attention_mask" in inputs and got.shape[-2] == inputs["attention_mask"].shape[1]:
            rows = inputs["attention_mask"].bool()
        assert_close(f"map {i}", *(t.transpose(1, 2)[rows].detach() for t in (got, want, base)))
    for name, t in plain.items():
        if isinstance(t, torch.Tensor):
            assert torch.equal(t, ours[name])


def test_output_attentions_in_a_config():
    config = transformers.ViTConfig(**IMAGE, output_attentions=True)
    model = transformers.ViTModel._from_config(config, attn_implementation="fastvit")
    assert [m.shape for m in model(PIXELS).attentions] == [(3, 4, 10, 10)] * 2
    model = build("ViT", "fastvit")[0]
    with pytest.raises(ValueError, match="output_attentions"):  # transformers' own error
        model.config.output_attentions = True


def test_hidden_states():
    model, inputs = build("ViT")
    eager = model(**inputs, output_hidden_states=True).hidden_states
    exact = exact_copy(model)(**cast(inputs, torch.float64), output_hidden_states=True).hidden_states
    model.set_attn_implementation("fastvit")
    ours = model(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == len(eager) == 3
    for i, states in enumerate(zip(ours, exact, eager, strict=True)):
        assert_close(f"state {i}", *(t.detach() for t in states))


def test_switching_leaves_no_trace():
    model, inputs = build("CLIP text")
    before, keys = model(**inputs).last_hidden_state, list(model.state_dict())
    model.set_attn_implementation("fastvit")
    assert model.config._attn_implementation == "fastvit"
    ours = model(**inputs).last_hidden_state
    model.set_attn_implementation("eager")
    assert torch.equal(model(**inputs).last_hidden_state, before)
    assert list(model.state_dict()) == keys
    model.set_attn_implementation("fastvit")
    assert torch.equal(model(**inputs).last_hidden_state, ours)


def test_auto_model_and_a_name_of_ones_own():
    register("fast_vit2")
    config = transformers.ViTConfig(**IMAGE)
    model = transformers.AutoModel.from_config(config, attn_implementation="fast_vit2")
    assert model(PIXELS).last_hidden_state.shape == (3, 10, 32)


def test_registering_twice_and_not_on_import(monkeypatch):
    known, masks = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    register()
    assert known == AttentionInterface._global_mapping
    assert masks == AttentionMaskInterface._global_mapping
    monkeypatch.delitem(AttentionInterface._global_mapping, "fastvit")
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, "fastvit")
    for name, value in vars(attention_interface).copy().items():
        monkeypatch.setattr(attention_interface, name, value)  # reloading makes new functions
    importlib.reload(attention_interface)
    assert "fastvit" not in AttentionInterface()
    assert "fastvit" not in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("name", ["", "fast/vit", "my_flash", "sdpa", "eager", "paged|fastvit"])
def test_names_that_transformers_reads_otherwise(name):
    with pytest.raises(ValueError, match="register: name must be"):
        register(name)
    assert name in ("sdpa", "eager") or name not in AttentionInterface()


def test_names_of_others():
    with pytest.raises(ValueError, match="another implementation's"):
        register("exact")
    with pytest.raises(TypeError, match="name must be a str, got int"):
        register(3)


def qkv(heads=4, tokens=6, keys=6, kv_heads=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, heads, tokens, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def call(q, k, v, mask=None, is_causal=False, **kwargs):
    return attention_interface.attention_forward(SimpleNamespace(is_causal=is_causal), q, k, v, mask, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"indices": torch.zeros(1)},
        {"sliding_window": 3},
        {"cu_seq_lens_q": torch.tensor([0, 6])},
        {"mask": torch.ones(2, 6, dtype=torch.bool)},
        {"mask": object()},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_cannot_be_computed_is_refused(kwargs):
    with pytest.raises(ValueError, match=r"fastvit\.integrations\.transformers: SimpleNamespace"):
        call(*qkv(), **kwargs)


def test_what_says_nothing_new_is_not_refused():
    q, k, v = qkv()
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    want = call(q, k, v, mask)[0]
    assert torch.equal(call(q, k, v, mask, sliding_window=3, cu_seq_lens_q=torch.tensor([0, 6]), softcap=None)[0], want)
    assert torch.equal(call(q, k, v, sliding_window=6)[0], call(q, k, v)[0])


def test_causality_is_the_calls_then_the_modules_and_not_of_one_query():
    q, k, v = qkv()
    causal, full = call(q, k, v, is_causal=True)[0], call(q, k, v)[0]
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    torch.testing.assert_close(causal, call(q, k, v, mask.tril())[0])
    torch.testing.assert_close(call(q, k, v, mask, is_causal=True)[0], full)
    torch.testing.assert_close(call(q[:, :, -1:], k, v, is_causal=True)[0], full[:, -1:])
    forced = attention_interface.attention_forward(SimpleNamespace(), q, k, v, None, is_causal=False)[0]
    torch.testing.assert_close(forced, full)
    torch.testing.assert_close(attention_interface.attention_forward(SimpleNamespace(), q, k, v, None)[0], causal)


@pytest.mark.parametrize("masked", ["no mask", "bool", "additive"])
def test_position_bias_is_added_to_the_scores_and_learns(masked):
    q, k, v = qkv(dtype=torch.float64)
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    visible[1, :, :, 4:] = False
    additive = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    mask = {"no mask": None, "bool": visible, "additive": additive}[masked]
    got = call(q, k, v, mask, position_bias=bias)[0]
    scores = q @ k.mT * 8**-0.5 + bias + (0 if mask is None else additive)
    want = (scores.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out.square().sum(), bias)[0] for out in (got, want)]
    torch.testing.assert_close(*grads)


def test_grouped_heads_and_one_batch_of_queries():
    q, k, v = qkv(kv_heads=2, keys=9)
    want = call(q, *(t.repeat_interleave(2, 1) for t in (k, v)))[0]
    assert torch.equal(call(q, k, v)[0], want)
    assert torch.equal(call(q[:1], k, v)[0], call(q[:1].expand(2, -1, -1, -1), k, v)[0])
    with pytest.raises(ValueError, match=r"fastvit\.attention: k must have shape"):
        call(*qkv(kv_heads=3))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_weights_of_a_query_that_sees_nothing_are_zeros_with_finite_gradients(kind):
    q, k, _ = qkv()
    q.requires_grad_()
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, 2] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    weights = attention_interface.attention_weights(q, k, mask, causal=True)
    assert torch.equal(weights[1, :, 2], torch.zeros(4, 6))
    assert torch.equal(weights, weights.tril())
    weights.square().sum().backward()
    assert q.grad.isfinite().all() and q.grad[0].abs().max() > 0


def test_dropout_keeps_the_mean_and_follows_the_seed():
    q, k, v = qkv()
    torch.manual_seed(1)
    first = call(q, k, v, dropout=0.4)[0]
    torch.manual_seed(1)
    assert torch.equal(call(q, k, v, dropout=0.4)[0], first)
    draws = torch.stack([call(q, k, v, dropout=0.4)[0] for _ in range(800)])
    spread = draws.std(0) / 800**0.5
    assert ((draws.mean(0) - call(q, k, v)[0]).abs() < 5 * spread + 1e-6).all()
    out, weights = call(q, k, v, dropout=0.4, output_attentions=True)
    assert 0.2 < (weights == 0).float().mean() < 0.6
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


def test_models_drop_while_they_train_alone(monkeypatch):
    rates, attention = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, dropout, **k: rates.append(dropout) or attention(*a, **k))
    config = transformers.ViTConfig(**IMAGE, attention_probs_dropout_prob=0.25)
    model = transformers.ViTModel._from_config(config, attn_implementation="fastvit")
    model.eval()(PIXELS)
    model.train()(PIXELS)
    assert rates == [0.0, 0.0, 0.25, 0.25]


def test_compiled_whole_and_by_layer():
    model, inputs = build("ViT", "fastvit")
    want, maps = model(**inputs)[0], model(**inputs, output_attentions=True).attentions
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs)[0], want)
    for got, eager in zip(compiled(**inputs, output_attentions=True).attentions, maps, strict=True):
        torch.testing.assert_close(got, eager)
    torch.compiler.reset()
    fresh = build("ViT", "fastvit")[0]
    for layer in fresh.layers:
        layer.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs)[0], want)
    torch.compiler.reset()
