"""Accelerated models that somebody changes, wraps or looks into afterwards compute what the untouched ones do."""

import copy

import pytest
import torch
from models import images, randomize, small_timm, timm
from tolerances import assert_close
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

import fastvit

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402


def small_hf():
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return randomize(transformers.ViTModel(config, add_pooling_layer=False)).eval()


def small_torchvision():
    return randomize(torchvision.models.VisionTransformer(32, 8, 3, 3, 48, 96, num_classes=11)).eval()


# library -> a model; its second block and, in it, attention, a norm, a linear layer and the activation
LIBRARIES = {
    "timm": (small_timm, "blocks.1", "attn", "norm1", "mlp.fc1", "mlp.act"),
    "transformers": (small_hf, "layers.1", "attention", "layernorm_before", "mlp.fc1", "mlp.activation_fn"),
    "torchvision": (small_torchvision, "encoder.layers.encoder_layer_1", "self_attention", "ln_1", "mlp.0", "mlp.1"),
}
BLOCK, ATTENTION, NORM, LINEAR, ACTIVATION = range(1, 6)


def path(library, place):
    block = LIBRARIES[library][BLOCK]
    return block if place == BLOCK else f"{block}.{LIBRARIES[library][place]}"


def run(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


class LowRank(nn.Module):
    """A linear layer and an update beside it, which shows the layer's weight as its own."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        generator = torch.Generator().manual_seed(1)
        self.down = nn.Parameter(torch.randn(4, linear.in_features, generator=generator) / 8)
        self.up = nn.Parameter(torch.randn(linear.out_features, 4, generator=generator))

    @property
    def weight(self):
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def doubled(module):
    """Put a forward on this instance that doubles what its class computes."""

    def forward(*args, **kwargs):
        y = type(module).forward(module, *args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y

    module.forward = forward
    return module


CHANGES = {
    "low rank update": (LINEAR, LowRank),
    "RMSNorm": (NORM, lambda norm: nn.RMSNorm(48)),
    "no norm": (NORM, lambda norm: nn.Identity()),
    "ReLU": (ACTIVATION, lambda act: nn.ReLU()),
    **{f"a forward on module {place}": (place, doubled) for place in range(1, 6)},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_child_that_is_replaced_is_called(library, change):
    model, x = LIBRARIES[library][0](), images()
    plain = copy.deepcopy(model)
    fastvit.accelerate(model)
    with torch.no_grad():
        before = run(model, x)  # what was read then must not be used again
    place, replaced = CHANGES[change]
    for changed in (model, plain):
        child = changed.get_submodule(path(library, place))
        changed.set_submodule(path(library, place), replaced(child))
    eager, exact = run(plain, x), run(plain.double(), x.double())
    with torch.no_grad():
        fused = run(model, x)
    assert not torch.allclose(fused, before, atol=1e-2)
    assert_close("no grad", fused, exact.detach(), eager.detach())
    assert_close("grad", run(model, x).detach(), exact.detach(), eager.detach())
    row = next(row for row in fastvit.report(model) if row.name == path(library, BLOCK))
    assert not row.fused and "accelerate" not in row.reason
    assert torch.equal(run(fastvit.restore(model), x), eager)


def test_a_child_with_a_fused_form_is_fused_at_the_next_call():
    model, x = fastvit.accelerate(small_timm()), images()
    scale = timm.models.vision_transformer.LayerScale(48, 0.3)
    model.blocks[1].ls1 = scale
    y = model(x)
    assert next(row for row in fastvit.report(model) if row.name == "blocks.1").fused
    plain = fastvit.restore(copy.deepcopy(model))
    assert_close("logits", y.detach(), copy.deepcopy(plain).double()(x.double()).detach(), plain(x).detach())


def test_a_wrapped_forward_outlives_restore():
    model, x = small_timm(), images()
    want = model(x)
    block = fastvit.accelerate(model).blocks[1]
    bound, calls = block.forward, []
    block.forward = lambda *args, **kwargs: calls.append(1) or bound(*args, **kwargs)
    model(x)
    assert torch.equal(fastvit.restore(model)(x), want)
    assert calls == [1, 1]


def test_a_projection_without_bias_beside_others():
    model, x = small_hf(), images()
    for layer in model.layers:
        layer.attention.q_proj.bias = None
    eager, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
    assert_close("states", run(fastvit.accelerate(model), x).detach(), exact.detach(), eager.detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("library", LIBRARIES)
def test_transforms_of_functions(library):
    model, x = LIBRARIES[library][0](), images()
    plain = copy.deepcopy(model)
    fastvit.accelerate(model)
    twin = randomize(copy.deepcopy(plain), seed=7)
    weights, buffers = stack_module_state([plain, twin])
    names = {name: p.detach() for name, p in plain.named_parameters()}

    def of(model):
        def loss(weights, image):
            return run_with(weights, image[None]).sum()

        def run_with(weights, x):
            y = functional_call(model, weights, (x,))
            return y if isinstance(y, torch.Tensor) else y.last_hidden_state

        ensemble = vmap(lambda w, b: run_with({**w, **b}, x))(weights, buffers)
        return ensemble.detach(), vmap(grad(loss), in_dims=(None, 0))(names, x)

    (got, got_grads), (want, want_grads) = of(model), of(plain)
    assert torch.equal(got, want)
    assert all(torch.equal(got_grads[name], want_grads[name]) for name in names)


def test_a_graph_of_torch_fx():
    model, x = small_timm(), images()
    want = model(x)
    assert torch.allclose(torch.fx.symbolic_trace(fastvit.accelerate(model))(x), want, atol=1e-4)
    model = small_torchvision()
    node = "encoder.layers.encoder_layer_1.add_1"
    want = create_feature_extractor(model, [node])(x)[node]
    assert torch.allclose(create_feature_extractor(fastvit.accelerate(model), [node])(x)[node], want, atol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks_of_all_modules_and_counters_see_what_they_do_in_eager(library):
    def seen(model):
        kinds = []
        hook = nn.modules.module.register_module_forward_hook(lambda m, _i, _y: kinds.append(type(m)))
        run(model, images())
        hook.remove()
        with FlopCounterMode(display=False) as counter:
            run(model, images())
        return kinds, counter.get_total_flops()

    model = LIBRARIES[library][0]()
    want = seen(model)
    assert seen(fastvit.accelerate(model)) == want


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_compiled_after_a_change(change):
    model, x = small_timm(), images()
    plain = copy.deepcopy(model)
    fastvit.accelerate(model)
    for changed in (model, plain):
        linear = changed.blocks[1].mlp.fc1
        if change == "hook":
            linear.register_forward_hook(lambda _m, _i, y: 2 * y)
        else:
            linear.forward = lambda x, linear=linear: 2 * nn.functional.linear(x, linear.weight, linear.bias)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), plain(x), atol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("differentiable", [False, True])
def test_replicas_read_their_own_parameters(library, differentiable):
    """What torch.nn.DataParallel does with a model, on one device and with other numbers."""

    def replica(model):
        modules = list(model.modules())
        copies = {id(m): m._replicate_for_data_parallel() for m in modules}
        for module in modules:
            for name, child in module._modules.items():
                copies[id(module)]._modules[name] = copies.get(id(child))
            for name, parameter in module._parameters.items():
                setattr(copies[id(module)], name, None if parameter is None else 1.1 * parameter)
        return copies[id(model)]

    model, x = LIBRARIES[library][0](), images()
    with torch.set_grad_enabled(differentiable):
        want = run(replica(model), x)
        fastvit.accelerate(model)
        run(model, x)
        assert torch.allclose(run(replica(model), x), want, atol=1e-4)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_norms_in_fp32_in_a_model_of_bf16(library, differentiable):
    model, x = LIBRARIES[library][0]().bfloat16(), images().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    with torch.set_grad_enabled(differentiable):
        eager, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
        assert_close("output", run(fastvit.accelerate(model), x).detach(), exact.detach(), eager.detach())


@pytest.mark.parametrize("make", [small_timm, small_torchvision])
def test_pixels_that_eager_refuses_are_refused(make):
    model = fastvit.accelerate(make())
    with pytest.raises(RuntimeError, match="should be the same"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
