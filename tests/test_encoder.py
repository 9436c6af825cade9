"""Whole encoder blocks in one call: values, options, threads; and packed weights that follow their parameters."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from blocks import block, eager
from harness import places
from models import images, randomize, small_timm, timm
from tolerances import assert_close
from torch import Tensor, nn

import fastvit
from fastvit import ops, prepack

LOW = (torch.float32, torch.bfloat16, torch.float16)
needs_kernel = pytest.mark.skipif(
    bool(fastvit.backends.why_unavailable("cpu")), reason=str(fastvit.backends.why_unavailable("cpu"))
)


def check(x: Tensor, blocks: list[ops.EncoderBlock], heads: int, activation: str = "gelu") -> None:
    exact = eager(x.double(), blocks, heads, activation)
    assert_close(
        "tokens", ops.encoder(x, blocks, heads, activation=activation), exact, eager(x, blocks, heads, activation)
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("place", places("encoder"))
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "hidden", "heads"),
    [
        (1, 1, 16, 16, 1),
        (2, 5, 48, 100, 3),
        (3, 17, 40, 33, 5),
        (1, 197, 64, 256, 1),
        (5, 50, 96, 65, 2),
        (2, 29, 21, 7, 3),
    ],
)
def test_values(place, dtype, batch, tokens, width, hidden, heads):
    blocks = [block(width, hidden, dtype, seed) for seed in range(3)]
    with fastvit.backend(place.backend):
        check(torch.randn(batch, tokens, width).to(dtype), blocks, heads)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("absent", [(), ("qkv_bias", "proj_bias", "fc1_bias", "fc2_bias"), ("layer_scale1",)])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_options(dtype, activation, absent):
    norms = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "layer_scale2") if not absent else ()
    blocks = [block(64, 96, dtype, 1, **dict.fromkeys(absent)), block(64, 96, dtype, 2, **dict.fromkeys(norms))]
    check(torch.randn(2, 23, 64).to(dtype), blocks, 2, activation)


@needs_kernel
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_instruction_set(isa, dtype):
    blocks = [block(72, 130, dtype, seed) for seed in range(2)]
    for batch, tokens in ((1, 61), (3, 33)):
        check(torch.randn(batch, tokens, 72).to(dtype), blocks, 3)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_batch(dtype, threads):
    blocks = [block(96, 160, dtype, seed) for seed in range(2)]
    x = torch.randn(7, 70, 96).to(dtype)
    threads(1)
    want = ops.encoder(x, blocks, 3)
    for count in (1, 2, 3, 5, 8):
        threads(count)
        assert torch.equal(ops.encoder(x, blocks, 3), want), count
        assert torch.equal(torch.cat([ops.encoder(part, blocks, 3) for part in x.split(2)]), want), count


@needs_kernel
def test_float32_has_the_bits_of_the_ops_one_by_one():
    blocks = [block(96, 160, seed=seed) for seed in range(2)]
    x = torch.randn(3, 70, 96)
    want = x
    for b in blocks:
        want = ops.encoder(want.requires_grad_(), [b], 3).detach()
    assert torch.equal(ops.encoder(x.detach(), blocks, 3), want)


@needs_kernel
def test_under_autocast_products_are_bfloat16_and_the_sum_float32():
    blocks = [block(64, 128, seed=seed) for seed in range(2)]
    x = torch.randn(2, 40, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, base = ops.encoder(x, blocks, 2), eager(x, blocks, 2)
    exact = eager(x.double(), blocks, 2)
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= 1.5 * (base - exact).norm()
    assert (got - exact).norm() > 10 * (ops.encoder(x, blocks, 2) - exact).norm()


def test_float64_and_gradients_go_one_by_one():
    b = block(8, 12, torch.float64)  # a Jacobian: its cost is that of a pass times all numbers there are
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ops.encoder(x, [b], 2), eager(x, [b], 2))
    leaves = [t.detach().requires_grad_() for t in b[:14]]
    assert torch.autograd.gradcheck(
        lambda x, *ts: ops.encoder(x, [ops.EncoderBlock(*ts)], 2), (x.requires_grad_(), *leaves), atol=1e-5
    )


def test_nothing_to_do():
    assert ops.encoder(torch.randn(0, 5, 16), [block(16, 8)], 2).shape == (0, 5, 16)
    assert ops.encoder(torch.randn(2, 0, 16), [block(16, 8)], 2).shape == (2, 0, 16)
    x = torch.randn(2, 3, 16)
    assert torch.equal(ops.encoder(x, [], 2), x)


def test_views():
    b, x = block(32, 48), torch.randn(4, 9, 64)
    for view in (x[::2, :, :32], x.transpose(0, 1)[..., 3:35], x[:1, :, :32].expand(3, 9, 32)):
        assert torch.equal(ops.encoder(view, [b], 2), ops.encoder(view.contiguous(), [b], 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide"),
        ({"x": torch.randn(9, 32)}, "x must be 3-D"),
        ({"activation": "relu"}, "activation must be"),
        ({"blocks": [block(32, 48)._replace(proj_weight=None)]}, r"blocks\[0\].proj_weight"),
        ({"blocks": [block(32, 48)._replace(qkv_weight=torch.randn(95, 32))]}, r"qkv_weight must have shape"),
        ({"blocks": [block(32, 48)._replace(fc2_bias=torch.randn(32).double())]}, r"fc2_bias must have x's dtype"),
        ({"blocks": [block(32, 48)._replace(norm2_eps=-1.0)]}, "eps must be"),
    ],
)
def test_bad_calls(change, message):
    with pytest.raises((TypeError, ValueError), match=f"fastvit.encoder: .*{message}"):
        ops.encoder(**{"x": torch.randn(2, 9, 32), "blocks": [block(32, 48)], "num_heads": 2, **change})


@needs_kernel
def test_a_direct_call_cannot_leave_its_tensors():
    native = torch.ops.fastvit_native
    b = block(32, 48)
    good = prepack.encoder(list(b[:14]), "float32")
    x = torch.randn(1, 5, 32)
    native.encoder(x, good, [1e-6, 1e-6], 2, 0.25, "gelu")
    other = native.pack_weight(torch.randn(48, 31), "float32")
    damaged = good[9][:-64].clone()
    for position, bad in (
        (2, other),
        (9, other),
        (11, good[4]),
        (4, torch.zeros(500, dtype=torch.uint8)),
        (9, damaged),
    ):
        with pytest.raises(RuntimeError, match="encoder: "):
            native.encoder(x, [bad if i == position else t for i, t in enumerate(good)], [1e-6] * 2, 2, 0.25, "gelu")
    for position in (0, 3, 10):
        short = [t[:-1] if i == position else t for i, t in enumerate(good)]
        with pytest.raises(RuntimeError, match="encoder: "):
            native.encoder(x, short, [1e-6] * 2, 2, 0.25, "gelu")
    mixed = [native.pack_weight(b.fc1_weight, "bfloat16") if i == 9 else t for i, t in enumerate(good)]
    for parameters, eps in ((good[:-1], [1e-6] * 2), (good, [1e-6]), (mixed, [1e-6] * 2)):
        with pytest.raises(RuntimeError, match="encoder: "):
            native.encoder(x, parameters, eps, 2, 0.25, "gelu")


# Packed weights


@pytest.fixture
def model() -> nn.Module:
    return fastvit.accelerate(small_timm(init_values=0.1))


def logits_of_eager(model: nn.Module, x: Tensor) -> Tensor:
    return fastvit.restore(copy.deepcopy(model))(x)


CHANGES = {
    "optimizer step": lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
    "in place": lambda m: [p.mul_(1.1) for p in m.parameters()],
    "through .data": lambda m: [p.data.mul_(1.1) for p in m.parameters()],
    "assigned .data": lambda m: [setattr(p, "data", p.data * 1.1) for p in m.parameters()],
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "assigned state": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}, assign=True),
    "new parameter": lambda m: setattr(m.blocks[1].mlp.fc1, "weight", nn.Parameter(m.blocks[1].mlp.fc1.weight * 1.1)),
    "another block": lambda m: m.blocks.__setitem__(1, copy.deepcopy(m.blocks[0])),
    "vector": lambda m: m.blocks[2].attn.qkv.bias.add_(0.3),
    "dtype and back": lambda m: m.bfloat16().float(),
    "eps": lambda m: setattr(m.blocks[2].norm2, "eps", 0.5),
    "activation": lambda m: [setattr(b.mlp, "act", timm.layers.activations.QuickGELU()) for b in m.blocks],
    "no LayerScale": lambda m: setattr(m.blocks[0], "ls1", nn.Identity()),
    "norm taken out and another put in": lambda m: (
        delattr(m.blocks[1], "norm2"),
        setattr(m.blocks[1], "norm2", nn.LayerNorm(48, eps=0.5)),
    ),
    "weight taken out and another put in": lambda m: (
        weight := m.blocks[0].mlp.fc1.weight,
        delattr(m.blocks[0].mlp.fc1, "weight"),
        setattr(m.blocks[0].mlp.fc1, "weight", nn.Parameter(weight * 1.1)),
    ),
    "no bias": lambda m: setattr(m.blocks[2].mlp.fc2, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters_are_packed_again(model, change):
    x = images()
    model(x).square().sum().backward()
    with torch.no_grad():
        for _ in range(2):
            before = model(x)
        CHANGES[change](model)
        after = model(x)
        assert not torch.allclose(after, before, atol=1e-4)
        torch.testing.assert_close(after, logits_of_eager(model, x), atol=1e-4, rtol=1e-4)


def test_dropouts_drop_when_training_begins():
    model, x = fastvit.accelerate(small_timm(proj_drop_rate=0.5)), images()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.allclose(model(x), model(x), atol=1e-4)


@needs_kernel
def test_quantised_and_restored_between_calls(model):
    x = images()
    with torch.no_grad():
        for parameter in model.parameters():  # other tests' models shall not find these copies
            parameter.mul_(1.01)
        before = model(x)
        fastvit.quantize(model)
        quantised = model(x)
        assert not torch.allclose(quantised, before, atol=1e-4)
        marks = [block.__dict__.pop("_fastvit_int8") for block in model.blocks]
        torch.testing.assert_close(model(x), before)
        for block, mark in zip(model.blocks, marks, strict=True):
            block.__dict__["_fastvit_int8"] = mark
        assert torch.equal(model(x), quantised)


@torch.inference_mode()
def test_parameters_made_in_inference_mode():
    model = fastvit.accelerate(small_timm())
    x = images()
    before = model(x)
    model.blocks[0].attn.proj.weight.mul_(3)
    torch.testing.assert_close(model(x), logits_of_eager(model, x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(x), before, atol=1e-4)


@needs_kernel
def test_deep_copies_share_what_is_packed_until_one_changes(model):
    x = images()
    with torch.no_grad():
        model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        both = [*model.parameters(), *twin.parameters()]
        assert 0 < prepack.bytes_of(both) < 1.05 * prepack.bytes_of(model.parameters())
        twin.blocks[0].mlp.fc2.weight.neg_()
        odd = copy.deepcopy(model)
        odd.blocks[1].mlp.fc1.weight[0, 7] += 30  # at a place that no fingerprint looks at
        for other in (twin, odd):
            assert not torch.allclose(other(x), model(x), atol=1e-4)
            torch.testing.assert_close(other(x), logits_of_eager(other, x), atol=1e-4, rtol=1e-4)
        assert fastvit.report(model).packed_bytes == prepack.bytes_of(model.parameters())
        assert "packed weights" in str(fastvit.report(model))
        fastvit.restore(model)
    assert fastvit.report(model).packed_bytes == 0


@needs_kernel
def test_packed_weights_die_with_their_parameters():
    gc.collect()
    before = len(prepack._packed)
    model = fastvit.accelerate(small_timm(init_values=0.1))  # no fixture: pytest would keep it alive
    with torch.no_grad():
        model(images())
    assert len(prepack._packed) > before + 10
    del model
    gc.collect()
    assert len(prepack._packed) <= before


def test_neither_copies_nor_what_was_read_is_pickled(model):
    with torch.no_grad():
        size = len(pickle.dumps(model))
        model(images())
        assert size <= len(pickle.dumps(model)) < size + 64  # an attribute that is None
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images()), model(images()))


def test_many_threads_at_once(model):
    x = [images(batch, seed=batch) for batch in (1, 2, 3, 5)]
    with torch.no_grad():
        want = [logits_of_eager(model, t) for t in x]
    wrong: list[str] = []

    def work(i: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                if not torch.allclose(model(x[i]), want[i], atol=1e-4, rtol=1e-4):
                    wrong.append(f"batch {len(x[i])}")

    workers = [threading.Thread(target=work, args=(i % 4,)) for i in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_in_one_graph_and_eagerly(dtype):
    torch._dynamo.reset()
    plain = small_timm(init_values=0.1).to(dtype)
    model, x = fastvit.accelerate(copy.deepcopy(plain)), images().to(dtype)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert_close("logits", got, copy.deepcopy(plain).double()(x.double()), plain(x))


def test_heads_that_are_wider_together_than_the_model(model):
    model = fastvit.restore(model)
    for b in model.blocks:
        b.attn = randomize(timm.models.vision_transformer.Attention(48, 3, attn_head_dim=32, qkv_bias=True)).eval()
    x = images()
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(fastvit.accelerate(model)(x), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_weights_that_lie_by_columns(model):
    for b in model.blocks:
        b.mlp.fc1.weight = nn.Parameter(b.mlp.fc1.weight.t().contiguous().t())
    x = images()
    want = logits_of_eager(model, x)
    torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fastvit.accelerate(model, release_original=True)(x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", ["blocks.1", "blocks.2.mlp.act", "blocks.0.attn.proj"])
def test_hooks_on_blocks_and_within_fire(model, place):
    seen = []
    with torch.no_grad():
        model(images())
        handle = model.get_submodule(place).register_forward_hook(lambda m, a, y: seen.append(y.shape))
        y = model(images())
        assert len(seen) == 1
        handle.remove()
        torch.testing.assert_close(model(images()), y, atol=1e-4, rtol=1e-4)
        assert len(seen) == 1


def test_a_block_put_in_later_computes_what_it_says(model):
    class Doubled(timm.models.vision_transformer.Block):
        def forward(self, x, **options):
            return 2 * super().forward(x, **options)

    model.blocks[1] = randomize(Doubled(48, 3, qkv_bias=True), seed=9).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images()), logits_of_eager(model, images()), atol=1e-4, rtol=1e-4)
