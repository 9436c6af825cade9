"""int8: what is computed, what stays as it was, which layers are chosen, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import images, small_timm
from test_encoder import block, eager, needs_kernel
from torch import Tensor, nn

import fastvit
from fastvit import native, prepack
from fastvit.ops.encoder import run_encoder

pytestmark = needs_kernel


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def fake_quantized(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in fp64 of what the bytes stand for: rows with ranges of their own, channels with steps."""
    low = x.amin(-1, keepdim=True)
    step = ((x.amax(-1, keepdim=True) - low) / 255).clamp_min(1e-30)
    rows = low + step * ((x - low) / step).round().clamp(0, 255)
    size = weight.abs().amax(1, keepdim=True) / 127
    return F.linear(rows, size * (weight / size).round(), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width", "hidden", "heads"), [(1, 33, 64, 100, 2), (3, 17, 40, 65, 5)])
def test_values(isa, dtype, batch, tokens, width, hidden, heads):
    blocks = [block(width, hidden, dtype, seed) for seed in range(2)]
    x = torch.randn(batch, tokens, width).to(dtype)
    eps = [e for b in blocks for e in b[14:]]
    parameters = [t for b in blocks for t in b[:14]]
    got = run_encoder(x, parameters, eps, heads, (width // heads) ** -0.5, "gelu", [True] * 8)
    exact, quantized = (eager(x.double(), blocks, heads, linear=linear) for linear in (F.linear, fake_quantized))
    assert got.dtype == dtype
    # As far from exact as quantised mathematics is, and bfloat16 attention on top.
    assert relative(got, exact) < 1.6 * relative(quantized, exact) + 0.006
    assert relative(got, quantized) < relative(quantized, exact) + 0.006


@pytest.mark.parametrize(("width", "heads"), [(45, 3), (35, 1)])
@pytest.mark.parametrize("int8", [[True, False, False, False], [False, True, True, False], [True, False, True, True]])
def test_what_lay_in_the_memory_before_does_not_matter(isa, threads, width, heads, int8):
    """Rows of an odd number of elements, of which layers in int8 and in bfloat16 leave other padding."""
    threads(1)
    parameters, x = block(width, 67)[:14], torch.randn(2, 21, width)
    run = lambda: run_encoder(x, parameters, [1e-6] * 2, heads, 0.2, "gelu", int8)  # noqa: E731
    clean, nan = run(), torch.full((900, 300), torch.nan)
    native.cpu.linear.forward(nan, nan, None, None, None, "none", False, None)  # the thread keeps its memory
    assert torch.equal(run(), clean)


@pytest.mark.parametrize("tokens", range(1, 16))
@pytest.mark.parametrize(("width", "hidden"), [(64, 128), (70, 83), (42, 790)])
def test_every_instruction_set_sums_bytes_alike(isa, tokens, width, hidden):
    """Tiles of every height and rows that end within a line; attention over equal rows, which is exact."""
    parameters, x = list(block(width, hidden)[:14]), torch.randn(2, tokens, width)
    parameters[2] = torch.zeros_like(parameters[2])
    run = lambda: run_encoder(x.bfloat16(), parameters, [1e-6] * 2, 2, 0.2, "gelu", [True] * 4)  # noqa: E731
    got = run()
    torch.ops.fastvit_native.cpu_isa("avx512_bf16" if isa == "amx" else isa)
    assert torch.equal(run(), got)


def test_bits_depend_neither_on_threads_nor_on_the_batch(threads):
    blocks = [block(96, 160, seed=seed) for seed in range(2)]
    parameters, x = [t for b in blocks for t in b[:14]], torch.randn(5, 70, 96)
    run = lambda x: run_encoder(x, parameters, [1e-6] * 4, 3, 0.2, "gelu", [True, False] * 4)  # noqa: E731
    threads(1)
    want = run(x)
    for count in (2, 3):
        threads(count)
        assert torch.equal(run(x), want)
        assert torch.equal(torch.cat([run(part) for part in x.split(2)]), want)


def test_rows_that_are_constant_or_not_finite():
    parameters = list(block(32, 48)[:14])
    x = torch.randn(3, 9, 32)
    x[0], x[1, 3, 5] = 2.0, float("nan")
    y = run_encoder(x, parameters, [1e-6] * 2, 2, 0.25, "gelu", [True] * 4)
    assert y[0].isfinite().all()
    assert y[1].isnan().any(-1).all()
    assert y[2].isfinite().all()
    parameters[10] = torch.full((48,), 0.1).index_fill(0, torch.tensor(7), float("nan"))  # one hidden channel
    assert run_encoder(x[2:], parameters, [1e-6] * 2, 2, 0.25, "gelu", [True] * 4).isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("weight", "channels"), [(2, 32), (9, 32), (11, 1)])
def test_weights_that_are_not_finite_show(isa, value, weight, channels):
    parameters = list(block(32, 48)[:14])
    parameters[weight] = parameters[weight].index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value))
    y = run_encoder(torch.randn(2, 9, 32), parameters, [1e-6] * 2, 2, 0.25, "gelu", [True] * 4)
    assert y.isnan().sum((0, 1)).tolist().count(18) == channels


@pytest.fixture
def model() -> nn.Module:
    return fastvit.accelerate(small_timm(embed_dim=96))


def test_model(model):
    x = images(4)
    before, state = model(x), copy.deepcopy(model.state_dict())
    report = fastvit.quantize(model)
    assert [layer.name for layer in report][:4] == [
        f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert len(report) == 12
    assert f"{sum(layer.int8 for layer in report)} layers in int8" in str(report)
    assert f"relative error of the output {report.error:.4f}" in str(report)
    with torch.no_grad():
        y = model(x)
    assert 1e-4 < relative(y, before) < 0.05
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(model(x), before)  # gradients are wanted
    fastvit.restore(model)
    with torch.no_grad():
        assert torch.equal(model(x), fastvit.restore(copy.deepcopy(model))(x))
        torch.testing.assert_close(fastvit.accelerate(model)(x), before, atol=1e-4, rtol=1e-4)


def test_threshold_and_calibration_decide(model):
    every = fastvit.quantize(model, threshold=float("inf"))
    assert all(layer.int8 for layer in every)
    none = fastvit.quantize(model, threshold=0)
    assert not any(layer.int8 for layer in none)
    assert none.error < every.error
    middle = sorted(layer.error for layer in every)[6]
    some = fastvit.quantize(model, threshold=middle)
    assert sum(layer.int8 for layer in some) == 7
    assert none.error < some.error < every.error
    batches = [images(2, seed=8), images(1, seed=9)]
    there = fastvit.quantize(model, batches, threshold=middle)
    assert [layer.error for layer in there] != [layer.error for layer in some]
    again = fastvit.quantize(model, torch.cat(batches), threshold=middle)
    assert [layer.error for layer in again] == pytest.approx([layer.error for layer in there], rel=1e-2)


def test_our_own_model_bfloat16_copies_and_modes():
    model = fastvit.create_model("vit_tiny_patch16_224", depth=2).bfloat16().train()
    report = fastvit.quantize(model, threshold=float("inf"))
    assert len(report) == 8
    assert model.training
    assert model.blocks[0].mlp.training
    x = torch.randn(1, 3, 224, 224).bfloat16()
    with torch.no_grad():
        y = model.eval()(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        assert not torch.equal(fastvit.restore(model)(x), y)


def test_int8_weights_take_a_quarter_of_the_memory(model):
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = 0.123  # or an equal model's copies may be shared
        for p in model.parameters():
            p.mul_(0.9)
        model(images())
    full = prepack.bytes_of(model.blocks.parameters())
    prepack.forget(model.parameters())
    fastvit.quantize(model, threshold=float("inf"))
    prepack.forget(model.parameters())
    with torch.no_grad():
        model(images())
    assert prepack.bytes_of(model.blocks.parameters()) < 0.3 * full


def test_bad_calls(model):
    for call, message in (
        (lambda: fastvit.quantize("model"), "model must be"),
        (lambda: fastvit.quantize(model, threshold=-1), "threshold"),
        (lambda: fastvit.quantize(model, []), "no images"),
        (lambda: fastvit.quantize(model, torch.randn(3, 4)), "calibration must be images"),
        (lambda: fastvit.quantize(model, ["x"]), "calibration must be images"),
        (lambda: fastvit.quantize(small_timm()), "call fastvit.accelerate first"),
        (lambda: fastvit.quantize(copy.deepcopy(model).to("meta")), "on the CPU"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"fastvit.quantize: .*{message}"):
            call()
