"""Whole blocks and whole models on the CUDA C++ kernels, on the emulator and on a GPU."""

import pytest
import torch
from blocks import block, eager
from models import randomize
from tolerances import assert_close
from torch import Tensor

import fastvit
from fastvit import ops

LOW = (torch.float16, torch.bfloat16)
BF16 = torch.bfloat16


def parameters_on(blocks: list[ops.EncoderBlock], device: str) -> list[ops.EncoderBlock]:
    return [ops.EncoderBlock(*[t.to(device) if isinstance(t, Tensor) else t for t in b]) for b in blocks]


def check(place, x: Tensor, blocks: list[ops.EncoderBlock], heads: int, activation: str = "gelu") -> None:
    with fastvit.backend("cuda"):
        there = x.to(place.device)
        got = ops.encoder(there, parameters_on(blocks, place.device), heads, activation=activation)
        assert torch.equal(there.cpu(), x), "the tokens were written to"
    exact = eager(x.double(), blocks, heads, activation)
    assert_close("encoder", got, exact, eager(x, blocks, heads, activation))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "hidden", "heads", "depth"),
    [(1, 1, 64, 64, 1, 1), (2, 17, 96, 200, 3, 1), (1, 50, 128, 512, 2, 3), (3, 9, 240, 56, 5, 2)],
)
def test_values(cuda_place, dtype, batch, tokens, width, hidden, heads, depth):
    blocks = [block(width, hidden, dtype, seed) for seed in range(depth)]
    check(cuda_place, torch.randn(batch, tokens, width).to(dtype), blocks, heads)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "none"])
@pytest.mark.parametrize(
    "absent",
    [(), ("qkv_bias", "proj_bias", "fc1_bias", "fc2_bias"), ("layer_scale1",), ("layer_scale1", "layer_scale2"),
     ("norm1_weight", "norm1_bias", "norm2_bias")],
)  # fmt: skip
def test_options(cuda_place, activation, absent):
    blocks = [block(64, 128, BF16, seed, **dict.fromkeys(absent)) for seed in range(2)]
    check(cuda_place, torch.randn(2, 20, 64).to(BF16), blocks, 2, activation)


def test_each_norm_has_its_eps(cuda_place):
    blocks = [block(64, 128, BF16, seed)._replace(norm1_eps=2.0 + seed, norm2_eps=0.1) for seed in range(2)]
    check(cuda_place, torch.randn(1, 10, 64).to(BF16), blocks, 2)


def test_it_is_one_call(cuda_place, monkeypatch):
    """Not the ops one by one: no launcher but the encoder's is asked to run."""
    for op in ("attention", "layer_norm", "linear", "norm_mlp"):
        launcher = fastvit.backends.implementation(op, "cuda")
        monkeypatch.setattr(type(launcher), "forward", lambda *args: pytest.fail("an op ran by itself"))
    check(cuda_place, torch.randn(1, 10, 64).to(BF16), [block(64, 128, BF16)], 2)


@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64)], ids=str)
def test_empty(cuda_place, shape):
    with fastvit.backend("cuda"):
        x = torch.randn(shape, dtype=BF16, device=cuda_place.device)
        blocks = parameters_on([block(64, 128, BF16)], cuda_place.device)
        assert ops.encoder(x, blocks, 2).shape == shape


def test_refusals(cuda_place):
    x = torch.randn(1, 5, 64, device=cuda_place.device)

    def reason(x, heads=2):
        blocks = parameters_on([block(x.shape[-1], 128, x.dtype)], cuda_place.device)
        return fastvit.why_not("encoder", x, blocks, heads, backend="cuda")

    assert "computes in float16, bfloat16, got float32" in reason(x)
    assert "multiples of 8 up to 128, got 4" in reason(x.half(), 16)
    assert "multiples of 8 up to 128, got 192" in reason(torch.randn(1, 2, 192, device=x.device).half(), 1)
    with torch.autocast(cuda_place.device, dtype=BF16):
        assert "not in autocast's bfloat16" in reason(x)
    assert reason(x.half()) is None


def test_a_direct_call_cannot_leave_its_tensors(cuda_place):
    x = torch.randn(1, 5, 64, dtype=BF16, device=cuda_place.device)
    good = [x.new_empty(0) if t is None else t.to(x.device) for t in block(64, 128, BF16)[:14]]
    native = fastvit.backends.implementation("encoder", "cuda").native
    assert native.encoder(x, good, [1e-6, 1e-6], 2, 0.2, "gelu").shape == x.shape
    wrong = {2: ("qkv_weight must have 192 rows", 3), 4: ("proj_weight must have 64 rows", 2)}
    wrong |= {11: ("fc2_weight must have 64 rows", 2), 0: ("norm_weight must have shape", 2)}
    for place, (message, share) in wrong.items():
        bad = [t[: len(t) // share].contiguous() if i == place else t for i, t in enumerate(good)]
        with pytest.raises(RuntimeError, match=message):
            native.encoder(x, bad, [1e-6, 1e-6], 2, 0.2, "gelu")
    with pytest.raises(RuntimeError, match="must have dtype"):
        native.encoder(x, [t.half() if i == 2 else t for i, t in enumerate(good)], [1e-6, 1e-6], 2, 0.2, "gelu")
    with pytest.raises(RuntimeError, match="14 parameters and 2 eps"):
        native.encoder(x, good[:13], [1e-6, 1e-6], 2, 0.2, "gelu")


def small(**options) -> fastvit.VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 5}
    return randomize(fastvit.VisionTransformer(**sizes, init_values=0.5, **options))


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_a_model_learns(cuda_place, backend):
    """Logits, and the gradients of every parameter, in bfloat16."""
    model, x = small(), torch.randn(2, 3, 32, 32)

    def run(dtype, backend, device="cpu"):
        twin = small().to(device, dtype)
        twin.load_state_dict(model.state_dict())
        with fastvit.backend(backend):
            logits = twin(x.to(device, dtype))
            logits.square().sum().backward()
            with torch.no_grad():
                plain = twin.eval()(x.to(device, dtype))
        return {"logits": logits, "logits without gradients": plain} | {n: p.grad for n, p in twin.named_parameters()}

    got = run(BF16, backend, cuda_place.device if backend == "cuda" else "cpu")
    want, yardstick = run(torch.float64, "reference"), run(BF16, "reference")
    for name, tensor in got.items():
        # Through two blocks the errors of both add up at random: the rule for whole models, with twice eager's error.
        error, eagers = ((t[name].double().cpu() - want[name]).norm() / want[name].norm() for t in (got, yardstick))
        assert error <= 2 * eagers + 1e-4, f"{name}: {error:.1e}, eager's {eagers:.1e}"
        assert tensor.isfinite().all()
