"""Our layers in Hugging Face's kernels: what the package asks of a layer, and the numbers of the modules they serve."""

import copy
import inspect
import sys
from types import MethodType, ModuleType

import pytest
import torch
from models import randomize, timm
from tolerances import assert_close
from torch import nn

from fastvit import ops
from fastvit.integrations import hf_kernels

transformers = pytest.importorskip("transformers")
from transformers.models.clip.modeling_clip import CLIPMLP  # noqa: E402
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTGatedMLP, DINOv3ViTMLP  # noqa: E402
from transformers.models.vit.modeling_vit import ViTMLP  # noqa: E402

SIZE = {"hidden_size": 24, "intermediate_size": 40}


class StandIn(ModuleType):
    """The protocol of the package's layers (0.18): marked classes, a mapping by device, and its rules for a layer."""

    def __init__(self):
        super().__init__("kernels")
        self.known = {}
        self.marked = {}

    def register_kernel_mapping(self, mapping, inherit_mapping=True):
        if not inherit_mapping:
            self.known.clear()
        for name, devices in mapping.items():
            self.known.setdefault(name, {}).update(devices)

    def replace_kernel_forward_from_hub(self, cls, layer_name):
        self.marked[cls] = layer_name

    def kernelize(self, model, *, device):
        for module in model.modules():
            if type(module) in self.marked:
                repository = self.known[self.marked[type(module)]][device]
                assert hash(repository) == hash(copy.deepcopy(repository))
                layer = repository.load()
                check_layer(layer, type(module))
                module.forward = MethodType(layer.forward, module)
        return model


def check_layer(layer, replaced):
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert members <= {"can_torch_compile", "has_backward"}
    kinds = [[p.kind for p in inspect.signature(c.forward).parameters.values()] for c in (layer, replaced)]
    assert kinds[0] == kinds[1]


@pytest.fixture
def kernels(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "kernels", module)
    hf_kernels.register()
    hf_kernels.register()
    module.replace_kernel_forward_from_hub(nn.LayerNorm, "LayerNorm")
    for cls in (ViTMLP, CLIPMLP, DINOv3ViTMLP):
        module.replace_kernel_forward_from_hub(cls, cls.__name__)
    module.replace_kernel_forward_from_hub(timm.layers.Mlp, "ViTMLP")
    module.replace_kernel_forward_from_hub(DINOv3ViTGatedMLP, "DINOv3ViTMLP")
    return module


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that were called."""
    seen = []
    for name in ("layer_norm", "linear"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _op=op, _name=name, **k: seen.append(_name) or _op(*a, **k))
    return seen


def run(module, x, dy):
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def check(module, kernels):
    x = torch.randn(2, 5, 24)
    randomize(module)
    exact = copy.deepcopy(module).double()
    dy = torch.randn_like(module(x))
    want, want_grads = run(exact, x.double(), dy)
    eager, eager_grads = run(module, x, dy)
    got, grads = run(kernels.kernelize(module, device="cpu"), x, dy)
    assert_close("y", got, want, eager)
    for name, grad in grads.items():
        assert_close(name, grad, want_grads[name], eager_grads[name], gradient=True)


def vit(act="gelu"):
    return transformers.ViTConfig(**SIZE, num_attention_heads=2, hidden_act=act)


MODULES = {
    "LayerNorm": (lambda: nn.LayerNorm(24, eps=1e-3), ["layer_norm"]),
    "LayerNorm without weights": (lambda: nn.LayerNorm(24, elementwise_affine=False), ["layer_norm"]),
    "LayerNorm of two dimensions": (lambda: nn.LayerNorm((5, 24)), []),
    "ViTMLP": (lambda: ViTMLP(vit()), ["linear"] * 2),
    "ViTMLP, gelu_new": (lambda: ViTMLP(vit("gelu_new")), ["linear"] * 2),
    "ViTMLP, gelu_pytorch_tanh": (lambda: ViTMLP(vit("gelu_pytorch_tanh")), ["linear"] * 2),
    "CLIPMLP, quick_gelu": (lambda: CLIPMLP(transformers.CLIPVisionConfig(**SIZE)), ["linear"] * 2),
    "DINOv3ViTMLP": (lambda: DINOv3ViTMLP(transformers.DINOv3ViTConfig(**SIZE)), ["linear"] * 2),
    "timm's Mlp": (lambda: timm.layers.Mlp(24, 40, drop=0.1).eval(), ["linear"] * 2),
    "an activation that the ops lack": (lambda: ViTMLP(vit("relu")), []),
    "a gate": (lambda: DINOv3ViTGatedMLP(transformers.DINOv3ViTConfig(**SIZE)), []),
}


@pytest.mark.parametrize("name", MODULES)
def test_kernelized_modules_compute_what_they_did(name, kernels, calls):
    make, expected = MODULES[name]
    check(make(), kernels)
    assert calls == expected


def test_dropout_and_hooks_keep_their_forward(kernels, calls):
    mlp = kernels.kernelize(timm.layers.Mlp(24, 40, drop=0.5), device="cpu")
    assert (mlp(torch.randn(2, 5, 24)) == 0).any()
    seen = []
    mlp.eval().fc1.register_forward_hook(lambda *_: seen.append(1))
    mlp(torch.randn(2, 5, 24))
    assert seen == [1] and calls == []


def test_a_whole_model_and_compile(kernels, calls):
    config = transformers.ViTConfig(**SIZE, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    model = randomize(transformers.ViTModel(config, add_pooling_layer=False)).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        want = model(x).last_hidden_state
        kernels.kernelize(model, device="cpu")
        torch.testing.assert_close(model(x).last_hidden_state, want, rtol=1e-4, atol=1e-5)
        assert sorted(calls) == ["layer_norm"] * 3 + ["linear"] * 2
        compiled = torch.compile(model.layers[0].mlp, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(want), model.layers[0].mlp(want))
    torch.compiler.reset()


def test_every_name_has_a_layer_on_every_device():
    mapping = hf_kernels.mapping()
    assert {"LayerNorm", "ViTMLP"} <= set(mapping)
    for name, devices in mapping.items():
        assert set(devices) == {"cpu", "cuda", "rocm"}
        assert all(r.load() is hf_kernels.LAYERS[name] and name in str(r) for r in devices.values())


@pytest.mark.parametrize("module", [None, ModuleType("kernels")], ids=["absent", "another package"])
def test_without_the_package(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", module)
    with pytest.raises(ImportError, match=r"hf_kernels\.register: needs Hugging Face's kernels package"):
        hf_kernels.register()
