"""accelerate on the rest of timm's Vision Transformers: EVA, DINOv3, BEiT, parallel blocks, attention pools, NaFlex."""

import copy
import pickle
from functools import partial

import pytest
import torch
from models import SMALL, images, randomize, timm
from timm.layers import AttentionPoolLatent, RmsNorm
from timm.models import beit, deit, eva, naflexvit, vision_transformer as vit, vision_transformer_relpos as relpos
from tolerances import assert_close
from torch import nn

import fastvit
from fastvit.fused import MARK

TWO = {**SMALL, "depth": 2}
ROPE = {**TWO, "use_rot_pos_emb": True}
DINO = {**ROPE, "rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 3, "no_embed_class": True}
DINO = {**DINO, "use_abs_pos_emb": False, "init_values": 0.1, "qkv_bias": True, "global_pool": "token"}


def naflex(**options):
    cfg = naflexvit.NaFlexVitCfg(patch_size=8, embed_dim=48, depth=2, num_heads=3, **options)
    return naflexvit.NaFlexVit(cfg, num_classes=11)


def vits(block=vit.Block, **options):
    return vit.VisionTransformer(**TWO, block_fn=block, **options)


# name -> (builder, a module that runs fused, its ops)
WHOLE, BRANCHES = {"layer_norm", "linear", "attention", "norm_mlp"}, {"layer_norm", "linear", "attention"}
ATTENTION, MLP = {"linear", "attention"}, {"linear"}
ONE_OUT = partial(vit.ParallelScalingBlock, fuse_out_proj=True)
CASES = {
    "eva01": (lambda: eva.Eva(**TWO), "blocks.0", WHOLE),
    "eva_rope": (lambda: eva.Eva(**ROPE, init_values=0.1, qkv_fused=False), "blocks.0", WHOLE),
    "eva_qk_norm": (lambda: eva.Eva(**ROPE, qk_norm=True, attn_only_layer_scale=True), "blocks.0", WHOLE),
    "eva_no_bias": (lambda: eva.Eva(**ROPE, qkv_bias=False, qkv_fused=False), "blocks.0", WHOLE),
    "eva02": (
        lambda: eva.Eva(**ROPE, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, qkv_fused=False),
        "blocks.0",
        BRANCHES,
    ),
    "eva_packed_swiglu": (lambda: eva.Eva(**ROPE, swiglu_mlp=True, init_values=0.1), "blocks.0", BRANCHES),
    "eva_scaled_mlp": (lambda: eva.Eva(**ROPE, scale_mlp=True, attn_type="rope"), "blocks.0", BRANCHES),
    "eva_post_norm": (lambda: eva.Eva(**ROPE, use_post_norm=True), "blocks.0.attn", ATTENTION),
    "dinov3": (lambda: eva.Eva(**DINO), "blocks.1", WHOLE),
    "dinov3_plus": (lambda: eva.Eva(**DINO, swiglu_mlp=True, swiglu_align_to=8), "blocks.1", BRANCHES),
    "rope": (lambda: eva.Eva(**ROPE, attn_type="rope", class_token=False, qk_norm=True), "blocks.0", WHOLE),
    "rope_mixed": (lambda: eva.Eva(**ROPE, rope_type="mixed"), "blocks.0", WHOLE),
    "perception": (
        lambda: eva.Eva(**ROPE, attn_type="rope", use_pre_transformer_norm=True, global_pool="map"),
        "attn_pool",
        BRANCHES,
    ),
    "beit": (lambda: beit.Beit(**TWO, use_rel_pos_bias=True, init_values=0.1), "blocks.0", WHOLE),
    "beit_shared": (lambda: beit.Beit(**TWO, use_shared_rel_pos_bias=True), "blocks.1", WHOLE),
    "beit_both": (
        lambda: beit.Beit(**TWO, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, qkv_bias=False),
        "blocks.1",
        WHOLE,
    ),
    "beit_swiglu": (lambda: beit.Beit(**TWO, use_rel_pos_bias=True, swiglu_mlp=True), "blocks.1", BRANCHES),
    "relpos": (lambda: relpos.VisionTransformerRelPos(**TWO, init_values=0.1, qk_norm=True), "blocks.0", WHOLE),
    "relpos_shared": (lambda: relpos.VisionTransformerRelPos(**TWO, shared_rel_pos=True), "blocks.0", WHOLE),
    "relpos_post_norm": (
        lambda: relpos.VisionTransformerRelPos(**TWO, block_fn=relpos.ResPostRelPosBlock),
        "blocks.0.attn",
        ATTENTION,
    ),
    "parallel": (lambda: vits(vit.ParallelScalingBlock, init_values=0.1), "blocks.0", BRANCHES),
    "parallel_one_out": (lambda: vits(ONE_OUT, init_values=0.1), "blocks.0", BRANCHES),
    "parallel_qk_norm": (lambda: vits(vit.ParallelScalingBlock, qk_norm=True, qkv_bias=False), "blocks.0", BRANCHES),
    "parallel_things": (lambda: vits(vit.ParallelThingsBlock, init_values=0.1), "blocks.0.attns.1.attn", ATTENTION),
    "post_norm": (lambda: vits(vit.ResPostBlock), "blocks.0.mlp", MLP),
    "scaled": (lambda: vits(scale_attn_norm=True, scale_mlp_norm=True), "blocks.0.attn", ATTENTION),
    "siglip": (lambda: vits(global_pool="map", class_token=False), "attn_pool", BRANCHES),
    "deit": (lambda: deit.VisionTransformerDistilled(**TWO), "blocks.0", WHOLE),
    "naflex": (lambda: naflex(), "blocks.0", WHOLE),
    "naflex_rope": (lambda: naflex(rope_type="axial", attn_type="rope"), "blocks.0", WHOLE),
}


def model_of(name):
    return randomize(CASES[name][0]()).eval()


def gradients(model, x, dy, **options):
    model.zero_grad()
    y = model(x, **options)
    (y * dy.to(y.dtype)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused_names(model):
    return {name for name, module in model.named_modules() if MARK in module.__dict__}


def agree(model, x, **options):
    """Output and all gradients by the tolerance rule, then bit for bit what was there before."""
    dy = torch.randn(model(x, **options).shape, generator=torch.Generator().manual_seed(1))
    eager, eager_grads = gradients(model, x, dy, **options)
    wide = {key: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for key, t in options.items()}
    exact, exact_grads = gradients(copy.deepcopy(model).double(), x.double(), dy, **wide)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    fastvit.accelerate(model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    fused, grads = gradients(model, x, dy, **options)
    assert_close("output", fused, exact, eager)
    assert grads.keys() == eager_grads.keys()
    sizes = {name: grad.norm() for name, grad in exact_grads.items()}
    flat = {name for name, size in sizes.items() if size < 1e-9}  # softmax does not see them: rounding errors alone
    if x.dtype == torch.float32:
        for name in grads.keys() - flat:
            assert_close(name, grads[name], exact_grads[name], eager_grads[name], gradient=True)
    else:  # in one, as single rounding errors decide about the few numbers of a bias
        together = [
            torch.cat(
                [(its[name].double() / sizes[name]).to(its[name].dtype).flatten() for name in grads.keys() - flat]
            )
            for its in (grads, exact_grads, eager_grads)
        ]
        assert_close("gradients", *together, gradient=True)
    for name in flat:
        assert grads[name].norm() <= 10 * eager_grads[name].norm() + 1e-6, name
    with torch.no_grad():  # the second time with the weights that the first one packed
        for _ in range(2):
            assert_close("inference", model(x, **options), exact, eager)
    fastvit.restore(model)
    assert not fused_names(model)
    assert torch.equal(model(x, **options), eager)


@pytest.mark.parametrize("name", CASES)
def test_fp32(name):
    agree(model_of(name), images())


@pytest.mark.parametrize("name", CASES)
def test_bf16(name):
    agree(model_of(name).bfloat16(), images(16).bfloat16())


@pytest.mark.parametrize("name", CASES)
def test_report(name):
    _, module, ops = CASES[name]
    model = fastvit.accelerate(model_of(name))
    row = next(row for row in fastvit.report(model) if row.name == module)
    assert row.fused
    assert set(row.ops) - {"encoder"} == ops
    eager = {row.name: row.reason for row in fastvit.report(model) if not row.fused and row.name.endswith("attn")}
    assert not eager


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
@pytest.mark.parametrize("name", ["eva_rope", "eva02", "rope", "parallel", "perception"])
def test_masks(name, kind):
    model = model_of(name)
    tokens = 16 + model.num_prefix_tokens
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(1, 1, tokens, tokens, generator=generator) > 0.4
    mask |= torch.eye(tokens, dtype=torch.bool)
    if kind == "additive":
        mask = torch.randn(2, 3, tokens, tokens, generator=generator)
    options = {"is_causal": True} if kind == "causal" else {"attn_mask": mask}
    plain = model.forward_features(images())
    assert not torch.allclose(model.forward_features(images(), **options), plain, atol=0.1)
    model.forward = model.forward_features
    agree(model, images(), **options)


def test_naflex_with_images_of_several_sizes():
    model = model_of("naflex_rope")
    patches = torch.randn(2, 12, 192, generator=torch.Generator().manual_seed(1))
    coordinates = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1).view(1, 12, 2)
    valid = torch.arange(12) < torch.tensor([[12], [8]])
    agree(model, patches, patch_coord=coordinates.repeat(2, 1, 1), patch_valid=valid)


@pytest.mark.parametrize("options", [ROPE, DINO, {**ROPE, "rope_type": "mixed"}], ids=["cat", "dinov3", "mixed"])
def test_another_size_than_the_models(options):
    model = randomize(eva.Eva(**options, dynamic_img_size=True)).eval()
    agree(model, torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("option", ["drop_path_rate", "proj_drop_rate", "patch_drop_rate"])
@pytest.mark.parametrize(
    "build",
    [
        partial(eva.Eva, **ROPE, init_values=0.1),
        partial(eva.Eva, **DINO, swiglu_mlp=True),
        partial(eva.Eva, **ROPE, scale_mlp=True, use_post_norm=True),
        partial(vits, vit.ParallelScalingBlock, init_values=0.1),
        partial(vits, ONE_OUT),
        partial(vits, vit.ParallelThingsBlock),
        partial(beit.Beit, **TWO, use_rel_pos_bias=True),
        partial(relpos.VisionTransformerRelPos, **TWO),
    ],
    ids=["eva", "dinov3", "post_norm", "parallel", "one_out", "things", "beit", "relpos"],
)
def test_training_drops_what_eager_drops(build, option):
    if option == "patch_drop_rate" and "patch_drop_rate" not in build().__init__.__code__.co_varnames:
        return
    model, x = randomize(build(**{option: 0.4})).train(), images(6)

    def run():
        torch.manual_seed(3)
        return model(x)

    want = run()
    fastvit.accelerate(model)
    assert torch.allclose(run(), want, atol=1e-4)
    torch.manual_seed(4)
    assert not torch.allclose(model(x), want, atol=1e-2)


@pytest.mark.parametrize("name", ["eva02", "rope", "parallel_qk_norm", "siglip", "beit", "dinov3"])
def test_autocast(name):
    model, x = model_of(name), images(16)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        eager = model(x)
        fused = fastvit.accelerate(model)(x)
    assert_close("logits", fused, exact, eager)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: eva.EvaBlock(48, 3, gated_attn=True, scale_attn_inner=True, init_values=0.1), (2, 9, 48)),
        (lambda: eva.EvaAttention(48, 3, gated=True, scale_norm=False), (2, 9, 48)),
        (lambda: vit.Attention(48, 3, gated=True, qkv_bias=True), (2, 9, 48)),
        (lambda: AttentionPoolLatent(48, num_heads=3, qk_norm=True, latent_len=3, pool_type="avg"), (2, 9, 48)),
        (lambda: AttentionPoolLatent(48, num_heads=3, pos_embed="abs", feat_size=9, pool_type=""), (2, 9, 48)),
        (lambda: AttentionPoolLatent(48, num_heads=3, q_proj=False, out_features=0), (2, 9, 48)),
        (lambda: AttentionPoolLatent(48, 24, num_heads=3, latent_dim=10, norm_layer=nn.LayerNorm), (2, 9, 48)),
        (lambda: timm.layers.GluMlp(48, 64, norm_layer=nn.LayerNorm), (2, 9, 48)),
        (lambda: timm.layers.SwiGLU(48, 40, out_features=20, bias=False), (3, 48)),
        (lambda: timm.layers.Mlp(48, 40, norm_layer=nn.LayerNorm), (2, 3, 4, 48)),
    ],
)
def test_layers_by_themselves(build, shape):
    model = randomize(build()).eval()
    fastvit.accelerate(model)
    assert "" in fused_names(model)
    agree(fastvit.restore(model), torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def test_a_pool_masks_tokens():
    pool = randomize(AttentionPoolLatent(48, num_heads=3)).eval()
    agree(pool, torch.randn(2, 9, 48), attn_mask=(torch.arange(9) < torch.tensor([[9], [5]]))[:, None, None])


@pytest.mark.parametrize(
    ("build", "name", "words"),
    [
        (
            lambda: eva.Eva(**ROPE, attn_type="rope", qkv_fused=False, num_kv_heads=1),
            "blocks.0",
            "3 heads of queries on 1",
        ),
        (lambda: eva.Eva(**ROPE, norm_layer=RmsNorm), "blocks.0", "norm1: RmsNorm is not a LayerNorm"),
        (lambda: vits(vit.DiffParallelScalingBlock), "blocks.0", "differential attention"),
        (lambda: vits(attn_layer="diff"), "blocks.1.attn", "differential attention"),
        (lambda: vits(attn_layer="diff"), "blocks.1", "attention is DiffAttention"),
        (lambda: vits(mlp_layer=timm.layers.GluMlp), "blocks.0", "MLP is GluMlp"),
        (lambda: vits(vit.ParallelScalingBlock, norm_layer=RmsNorm), "blocks.0", "in_norm: RmsNorm"),
    ],
)
def test_reasons(build, name, words):
    model, x = randomize(build()).eval(), images()
    want = model(x)
    fastvit.accelerate(model)
    rows = {row.name: row for row in fastvit.report(model)}
    assert words in rows[name].reason
    assert torch.allclose(model(x), want, atol=1e-4)


def test_parts_can_be_left_eager():
    model, x = model_of("dinov3_plus"), images()
    want = model(x)
    for part, ending in (("attention", "attn"), ("mlp", "mlp"), ("layer_norm", "norm1")):
        with fastvit.accelerated(model, **{part: False}):
            names = fused_names(model)
            assert names
            assert not any(name.endswith(ending) or name == "blocks.0" for name in names)
            assert torch.allclose(model(x), want, atol=1e-4)


@pytest.mark.parametrize("name", ["eva_rope", "eva02", "beit", "parallel", "siglip"])
def test_hooks_copies_pickles_and_checkpoints(name):
    model, x, seen = model_of(name), images(), []
    dy = torch.randn(2, 11)
    fastvit.accelerate(model)
    want, want_grads = gradients(model, x, dy)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_names(twin) == fused_names(model)
        assert torch.equal(twin(x), want)
    model.set_grad_checkpointing()
    _, grads = gradients(model, x, dy)
    assert all(torch.equal(grad, want_grads[key]) for key, grad in grads.items())
    norm = next(m for m in model.blocks[0].modules() if isinstance(m, nn.LayerNorm))
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(model.eval()(x), want, atol=1e-4)
    assert seen
    assert "hook" in next(row for row in fastvit.report(model) if row.name == "blocks.0").reason
    handle.remove()


@pytest.mark.parametrize("name", ["perception", "beit_swiglu", "parallel_one_out"])
def test_compile_fullgraph(name):
    model, x = model_of(name), images()
    model.blocks = model.blocks[:1]
    fastvit.accelerate(model)
    dy = torch.randn(2, 11)
    want, want_grads = gradients(model, x, dy)
    got, grads = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x, dy)
    assert torch.allclose(got, want, atol=1e-5)
    assert len(grads) == len(want_grads)
    for (key, grad), other in zip(grads.items(), want_grads.values(), strict=True):
        assert torch.allclose(grad, other, rtol=1e-3, atol=1e-4), key
