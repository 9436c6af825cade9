"""What every op owes PyTorch, of the CUDA kernels: opcheck, one graph, no silent second derivative, global state."""

import importlib

import pytest
import torch
from calls import CALLS, PUBLIC, Call
from torch.library import opcheck

import fastvit
from fastvit import backends, native_cuda

HALF = torch.float16
each_op = pytest.mark.parametrize("name", [n for n in PUBLIC if "cuda" in backends.OPS[fastvit.ops._PUBLIC[n][0]]])


def low(call: Call) -> dict[str, torch.Tensor]:
    return {name: t.detach().to(HALF).requires_grad_() for name, t in call.tensors().items()}


@each_op
def test_opcheck(cuda_place, name):
    """The operator that the public function calls, with the arguments that it gives it."""
    call, seen = Call(name, cuda_place), []
    module = importlib.import_module(f"fastvit.ops.{fastvit.ops._PUBLIC[name][0]}")
    operator, tensors = module._op, low(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_op", lambda *args: (seen.append(args), operator(*args))[1])
        if name == "encoder":  # for inference, and called through the dispatcher while a graph is made
            tensors = {name: t.detach() for name, t in tensors.items()}
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        call.run(tensors)
    (args,) = seen
    again = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    assert set(opcheck(operator, tuple(again)).values()) == {"SUCCESS"}


@each_op
def test_compiles_in_one_graph(cuda_place, name):
    torch._dynamo.reset()
    call = Call(name, cuda_place)
    tensors = low(call)
    with fastvit.backend("cuda"):
        want = CALLS[name][0](**tensors)
        got = torch.compile(lambda **t: CALLS[name][0](**t), fullgraph=True, backend="aot_eager")(**tensors)
    assert torch.equal(got, want)
    for w, g in zip(call.gradients(tensors, want), call.gradients(tensors, got), strict=True):
        assert torch.allclose(g, w, atol=2e-2, rtol=2e-3)


def test_a_graph_is_given_what_begins_off_16_bytes(cuda_place):
    """Compiling, nobody can ask where a tensor begins."""
    torch._dynamo.reset()
    memory = torch.randn(2 * 5 * 48 + 1, dtype=HALF, device=cuda_place.device)
    aligned, off = memory[:-1].view(2, 5, 48), memory[1:].view(2, 5, 48)
    with fastvit.backend("cuda"):
        compiled = torch.compile(lambda qkv: fastvit.ops.attention_packed(qkv, 2), fullgraph=True, backend="aot_eager")
        for qkv in (aligned, off):
            assert torch.equal(compiled(qkv), fastvit.ops.attention_packed(qkv.clone(), 2))


@each_op
def test_second_derivative_raises(cuda_place, name):
    call = Call(name, cuda_place)
    tensors = low(call)
    first = next(iter(tensors.values()))
    (grad,) = torch.autograd.grad(call.run(tensors).square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad|not differentiable"):
        torch.autograd.grad(grad.square().sum(), first)


@pytest.mark.parametrize(
    ("code", "runs_on", "not_on"),
    [
        ("sm_80", (80, 86, 89), (75, 90, 100)),
        ("sm_86", (86, 89), (80, 90)),
        ("sm_90a", (90,), (100, 80)),
        ("sm_120", (120, 121), (100, 90)),
        ("compute_80", (80, 86, 90, 120), (75,)),
        ("compute_90a", (90,), (80, 100)),
    ],
)
def test_which_code_runs_on_which_chip(code, runs_on, not_on):
    assert all(native_cuda._runs_on(code, chip) for chip in runs_on)
    assert not any(native_cuda._runs_on(code, chip) for chip in not_on)


def test_old_and_unknown_devices_are_refused_in_a_sentence(monkeypatch):
    built = {"cuda_architectures": ["sm_90a"]}
    monkeypatch.setattr(native_cuda.native, "build_info", lambda: built)
    assert "need compute capability 8.0 or newer, this device has 7.5" in native_cuda._judge((7, 5))
    assert "built for sm_90a, not for compute capability 10.0" in native_cuda._judge((10, 0))
    assert native_cuda._judge((9, 0)) == ""
