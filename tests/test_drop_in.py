"""accelerate / restore / accelerated / report on timm's models: same numbers, same keys, no trace left."""

import copy
import io
import pickle

import pytest
import torch
from models import SMALL, images, randomize, small_timm, timm, timm_model
from tolerances import assert_close
from torch import nn

import fastvit
from fastvit import fused

OPTIONS = [
    {},
    {"init_values": 0.1, "reg_tokens": 2},
    {"qk_norm": True, "global_pool": "avg"},
    {"class_token": False, "global_pool": "avg", "qkv_bias": False},
    {"pre_norm": True, "dynamic_img_size": True},
    {"act_layer": "gelu_tanh"},
]


def bound(model):
    return [name for name, m in model.named_modules() if "forward" in m.__dict__]


def gradients(model, x, dy):
    model.zero_grad()
    (model(x) * dy.to(x.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_gradients_and_restore(options):
    model = small_timm(**options)
    x = images()
    before, keys, kinds = model(x).detach(), list(model.state_dict()), [type(m) for m in model.modules()]
    dy = torch.randn_like(before)
    eager_grads = gradients(model, x, dy)
    exact = copy.deepcopy(model).double()
    exact_logits, exact_grads = exact(x.double()).detach(), gradients(exact, x.double(), dy)

    assert fastvit.accelerate(model) is model
    assert {"blocks.0", "blocks.1", "blocks.2", "patch_embed"} <= set(bound(model))
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert_close("logits", model(x).detach(), exact_logits, before)
    for name, grad in gradients(model, x, dy).items():
        assert_close(name, grad, exact_grads[name], eager_grads[name], gradient=True)

    assert fastvit.restore(model) is model
    assert bound(model) == []
    assert not any(fused.MARK in m.__dict__ for m in model.modules())
    assert torch.equal(model(x), before)


def test_full_size_model_in_bf16_and_fp32():
    model = timm_model("vit_tiny_patch16_224")
    x = images(2, 224)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        for dtype in (torch.float32, torch.bfloat16):
            low = copy.deepcopy(model).to(dtype)
            eager = low(x.to(dtype))
            rounded = copy.deepcopy(low).double()(x.to(dtype).double()) if dtype != torch.float32 else exact
            with fastvit.accelerated(low):
                fused = low(x.to(dtype))
            assert_close(str(dtype), fused, rounded, eager)
            assert torch.equal(low(x.to(dtype)), eager)


def test_autocast_keeps_the_dtypes_of_eager():
    model, x = small_timm(init_values=0.1), images()
    exact = copy.deepcopy(model).double()(x.double()).detach()
    shapes = []

    def run():
        hooks = [b.register_forward_hook(lambda _m, _i, y: shapes.append(y.dtype)) for b in model.blocks]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        for hook in hooks:
            hook.remove()
        return y

    eager = run()
    before, shapes = shapes, []
    with fastvit.accelerated(model):
        fused = run()
    assert shapes == before
    assert_close("logits", fused.detach(), exact, eager.detach())
    fused.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_twice_is_once_and_context_restores():
    model, x = small_timm(), images()
    want = model(x)
    with fastvit.accelerated(model) as inside:
        assert inside is model
        once = bound(model)
        fastvit.accelerate(model)
        assert bound(model) == once
    assert bound(model) == []
    fastvit.accelerate(model)
    with fastvit.accelerated(model, mlp=False):
        assert bound(model) != once
    assert bound(model) == once
    fastvit.restore(fastvit.restore(model))
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("part", ["attention", "layer_norm", "mlp", "patch_embed"])
def test_parts_can_be_left_eager(part):
    model, x = small_timm(), images()
    want = model(x)
    fastvit.accelerate(model, **{part: False})
    names = bound(model)
    endings = {"attention": ".attn", "layer_norm": "norm", "mlp": ".mlp", "patch_embed": "patch_embed"}
    assert not any(name.endswith(endings[part]) or (part == "layer_norm" and "norm" in name) for name in names)
    assert names
    assert torch.allclose(model(x), want, atol=1e-3)


@pytest.mark.parametrize("rate", ["proj_drop_rate", "drop_path_rate", "attn_drop_rate"])
def test_training_with_dropout(rate):
    model, x = small_timm(**{rate: 0.4}), images(16)
    fastvit.accelerate(model.train())
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    model.eval()
    fused = model(x)
    assert torch.allclose(fused, fastvit.restore(model)(x), atol=1e-3)


@pytest.mark.grid(6)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}], ids=str)
def test_drop_path_drops_the_samples_that_eager_drops(options, backend, autocast):
    if not fastvit.is_available(backend) or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip(f"GPU: {backend} does not run on CPU tensors here")
    model, x = small_timm(drop_path_rate=0.5, **options).train(), images(6)

    def training_forward():
        torch.manual_seed(3)
        with fastvit.backend(backend), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(x).float()

    eager = training_forward()
    fastvit.accelerate(model)
    assert torch.allclose(training_forward(), eager, atol=0.2 if autocast else 1e-3)


@pytest.mark.parametrize("changes", [{"scale_by_keep": False}, {"drop_prob": 1.0}], ids=str)
def test_unusual_drop_path_modules_are_called_themselves(changes):
    model, x = small_timm(drop_path_rate=0.5).train(), images(6)
    for block in model.blocks[1:]:
        for module in (block.drop_path1, block.drop_path2):
            vars(module).update(changes)
    torch.manual_seed(3)
    eager = model(x)
    fastvit.accelerate(model)
    torch.manual_seed(3)
    assert torch.allclose(model(x), eager, atol=1e-3)


def test_training_step_follows_eager():
    x, target = images(8), torch.randint(0, 11, (8,))

    def losses(accelerated):
        model = small_timm().train()
        if accelerated:
            fastvit.accelerate(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        history = []
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(loss.item())
        return history

    eager, fused = losses(False), losses(True)
    assert eager[-1] < 0.5 * eager[0]
    assert fused == pytest.approx(eager, rel=1e-3)


def test_report_names_every_module():
    model = small_timm()
    before = {row.name: row for row in fastvit.report(model)}
    assert not before["blocks.0"].fused
    assert "call fastvit.accelerate" in before["blocks.0"].reason
    fastvit.accelerate(model)
    rows = {row.name: row for row in fastvit.report(model)}
    assert rows["blocks.0"].fused
    assert set(rows["blocks.0"].ops) - {"encoder"} == {"layer_norm", "linear", "attention", "norm_mlp"}
    assert rows["patch_embed"].ops.keys() == {"patch_embed"}
    assert rows["norm"].fused
    assert not rows["head"].fused
    assert "no fused form of Linear" in rows["head"].reason
    assert rows[""].reason == "uses cls_token, pos_embed as its class does"
    covered = [row.name for row in fastvit.report(model) if row.fused]
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and name:
            assert name in rows or any(name.startswith(f"{c}.") for c in covered), name
    with fastvit.backend("reference"):
        assert set(next(r for r in fastvit.report(model) if r.name == "norm").ops.values()) == {"reference"}
    assert "blocks.0" in str(fastvit.report(model))
    ours = {row.name: row for row in fastvit.report(fastvit.VisionTransformer(**SMALL))}
    assert ours["blocks.0"].fused
    assert ours["patch_embed"].fused


def test_hooks_keep_a_block_eager_and_fire():
    model, x = small_timm(), images()
    want, seen = model(x), []
    handle = model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    fastvit.accelerate(model)
    assert "blocks.1" not in bound(model)
    rows = {row.name: row for row in fastvit.report(model)}
    assert "hook" in rows["blocks.1"].reason
    assert torch.allclose(model(x), want, atol=1e-3)
    assert seen == [1]
    late = model.blocks[0].attn.proj.register_forward_hook(lambda *_: seen.append(2))
    model(x)
    assert seen == [1, 2, 1]
    for h in (handle, late):
        h.remove()
    outer = []
    model.blocks[0].register_forward_hook(lambda *_: outer.append(1))
    model(x)
    assert outer == [1]


class OddMlp(timm.layers.Mlp):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_is_not_understood_stays_eager_and_says_why():
    model, x = small_timm(), images()
    model.blocks[0].mlp.__class__ = OddMlp
    model.blocks[1].attn.qkv = nn.utils.parametrizations.weight_norm(model.blocks[1].attn.qkv)
    want = model(x)
    fastvit.accelerate(model)
    assert torch.allclose(model(x), want, atol=1e-3)
    rows = {row.name: row for row in fastvit.report(model)}
    assert "MLP is OddMlp" in rows["blocks.0"].reason
    assert "qkv is a ParametrizedLinear" in rows["blocks.1"].reason
    assert rows["blocks.2"].fused
    with pytest.raises(RuntimeError, match=r"strict, but .* modules stay eager: .*blocks.0: MLP is OddMlp"):
        fastvit.accelerate(model, strict=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: setattr(b.attn, "gate", nn.Linear(48, 48)), "attention is gated"),
        (lambda b: setattr(b.attn, "norm", nn.LayerNorm(48)), "attention normalises its output"),
        (lambda b: setattr(b, "mlp", timm.layers.Mlp(48, 96, norm_layer=nn.LayerNorm)), "MLP normalises its hidden"),
        (lambda b: setattr(b, "mlp", timm.layers.Mlp(48, 96, act_layer=nn.SiLU)), "activation SiLU has no fused form"),
        (lambda b: setattr(b, "norm1", timm.layers.RmsNorm(48)), "norm1: RmsNorm is not a LayerNorm"),
        (lambda b: setattr(b, "drop_path1", nn.Dropout(0.1)), "drop_path1 is a Dropout"),
    ],
)
def test_every_variant_that_computes_something_else_stays_eager(change, words):
    model, x = small_timm(), images()
    change(model.blocks[1])
    randomize(model).eval()
    want = model(x)
    fastvit.accelerate(model)
    rows = {row.name: row for row in fastvit.report(model)}
    assert not rows["blocks.1"].fused
    assert words in rows["blocks.1"].reason
    assert torch.allclose(model(x), want, atol=1e-3)


def test_a_forward_of_the_users_own_is_left_alone():
    model, x = small_timm(), images()
    model.blocks[0].forward = lambda x: x
    want = model(x)
    fastvit.accelerate(model)
    assert torch.allclose(model(x), want, atol=1e-3)
    fastvit.restore(model)
    assert "forward" in model.blocks[0].__dict__
    assert torch.equal(model(x), want)


def test_inside_a_larger_model():
    model = nn.Sequential(small_timm(), nn.ReLU(), nn.Linear(11, 2))
    x = images()
    want = model(x)
    fastvit.accelerate(model)
    assert "0.blocks.0" in bound(model)
    assert torch.allclose(model(x), want, atol=1e-3)


def test_copies_and_pickles():
    model, x = fastvit.accelerate(small_timm()), images()
    want = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(x), want)
    assert bound(twin)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), want)
    buffer = io.BytesIO()
    torch.save(twin.state_dict(), buffer)
    buffer.seek(0)
    fresh = small_timm()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.allclose(fresh(x), want, atol=1e-3)


def test_compile_fullgraph():
    model, x = fastvit.accelerate(small_timm(init_values=0.1)), images()
    want = model(x).detach()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    assert torch.allclose(got.detach(), want, atol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_checkpointing():
    model, x = randomize(small_timm()).train(), images()
    fastvit.accelerate(model)
    dy = torch.randn(2, 11)
    want = gradients(model, x, dy)
    model.set_grad_checkpointing()
    for name, grad in gradients(model, x, dy).items():
        assert torch.equal(grad, want[name]), name


def test_bad_calls():
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got str"):
        fastvit.accelerate("vit")
    with pytest.raises(TypeError, match="restore: model must be"):
        fastvit.restore(None)
    with pytest.raises(TypeError, match="report: model must be"):
        fastvit.report(3)
    with pytest.raises(
        ValueError, match="found no Vision Transformer module of timm, transformers, torchvision in Linear"
    ):
        fastvit.accelerate(nn.Linear(2, 2))
    ours = fastvit.VisionTransformer(**SMALL)
    assert fastvit.accelerate(ours) is ours
