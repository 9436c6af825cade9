"""Originals released: the same bits from one copy of the weights, the way back, and an error wherever it is missed."""

import copy
import gc
import io
import pickle
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from models import images, small_timm, timm
from test_encoder import needs_kernel
from tolerances import assert_close
from torch import Tensor, nn

import fastvit
from fastvit import ops, prepack
from fastvit.prepack import Released

pytestmark = needs_kernel

LOW = (torch.float32, torch.bfloat16, torch.float16)
GONE = r"was released \(accelerate\(\.\.\., release_original=True\)\).*call fastvit.restore\(model\) first"


def plain(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    options = {"embed_dim": 96, "depth": 2, "mlp_ratio": 2.6, "init_values": 0.1, **options}
    return small_timm(**options).to(dtype)


def ours(dtype: torch.dtype = torch.float32) -> nn.Module:
    made = fastvit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3, mlp_ratio=2.6, num_classes=11, init_values=0.1
    )
    made.load_state_dict(plain().state_dict())
    return made.to(dtype).eval()


def released(dtype: torch.dtype = torch.float32, make=plain, **options) -> nn.Module:
    return fastvit.accelerate(make(dtype, **options), release_original=True)


def weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if isinstance(p, Released)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("make", [plain, ours])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@torch.no_grad()
def test_the_same_bits_as_before_and_the_way_back(isa, dtype, make):
    gc.collect()  # models of before, whose copies for other instruction sets would be shared
    eager, normal, model = plain(dtype), fastvit.accelerate(make(dtype)), released(dtype, make)
    state = copy.deepcopy(normal.state_dict())
    assert len(weights(model)) == 8
    for batch in (1, 3):
        x = images(batch).to(dtype)
        assert torch.equal(model(x), normal(x))
        assert_close("logits", model(x), copy.deepcopy(eager).double()(x.double()), eager(x))
    assert same(model.state_dict(), state)
    assert model.blocks[0].attn.qkv.weight.dtype == dtype
    report = fastvit.report(model)
    assert report.released_bytes == sum(p.numel() * p.element_size() for p in weights(model))
    assert report.packed_bytes == fastvit.report(normal).packed_bytes > 0
    assert f"released originals: {report.released_bytes / 2**20:.1f} MiB" in str(report)
    x = images(3).to(dtype)
    want = normal(x)
    for back in (fastvit.restore, fastvit.accelerate):
        back(model)
        assert not weights(model)
        assert same(dict(model.named_parameters()), state)
        assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
        assert fastvit.report(model).released_bytes == 0
        assert prepack.bytes_of(p for p in model.parameters() if p.dim() == 2) == 0
        assert torch.equal(fastvit.accelerate(model, release_original=True)(x), want)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 3), (32, 64), (33, 65), (70, 31), (7, 0), (0, 7)])
def test_unpacking_is_the_inverse_of_packing(isa, n, k):
    native = torch.ops.fastvit_native
    for dtype in (*LOW[:2], torch.float64):
        weight = torch.randn(n, 2 * k, dtype=dtype)[:, :k]
        if weight.numel():
            weight[0, 0] = torch.finfo(dtype).smallest_normal / 2  # and other numbers that arithmetic may change
            weight[-1, -1] = -0.0
            weight[-1, 0] = torch.nan if n > 1 else torch.inf
        name = str(dtype).removeprefix("torch.")
        got = native.unpack_weight(native.pack_weight(weight, name))
        size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        assert got.dtype == dtype
        assert torch.equal(got.view(size), weight.contiguous().view(size))
    packed = native.pack_weight(torch.randn(9, 4), "float32")
    for bad in (native.pack_weight(torch.randn(9, 4), "int8"), packed[:-1].clone(), packed[:70], torch.randn(9)):
        with pytest.raises(RuntimeError, match="unpack_weight: "):
            native.unpack_weight(bad)


def test_every_half_comes_back():
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[~every.isnan()][: 96 * 96 * 6].view(6, 96, 96)
    for numbers in every:
        model = plain(torch.float16)
        model.blocks[0].attn.proj.weight.data = numbers
        fastvit.accelerate(model, release_original=True)
        got = model.state_dict()["blocks.0.attn.proj.weight"]
        assert torch.equal(got.view(torch.int16), numbers.contiguous().view(torch.int16))


@torch.no_grad()
def test_the_originals_are_gone_and_the_packed_copies_follow_the_model():
    before = len(prepack._packed), len(prepack._encoders), len(prepack._by_content)
    for _ in range(20):
        model = plain()
        original = [p.untyped_storage()._weak_ref() for p in model.blocks.parameters() if p.dim() == 2]
        fastvit.accelerate(model, release_original=True)
        assert all(torch.UntypedStorage._expired(ref) for ref in original)
        for ref in original:
            torch.UntypedStorage._free_weak_ref(ref)
        model(images())
        copies = [p.packed.untyped_storage()._weak_ref() for p in weights(model)]
        fastvit.restore(model)
        assert all(torch.UntypedStorage._expired(ref) for ref in copies)
        for ref in copies:
            torch.UntypedStorage._free_weak_ref(ref)
        fastvit.accelerate(model, release_original=True)(images())
        assert prepack.bytes_of(model.parameters()) > 0
    del model
    gc.collect()
    assert (len(prepack._packed), len(prepack._encoders), len(prepack._by_content)) == before


@torch.no_grad()
def test_deep_copies_share_and_part_when_one_is_loaded():
    model, x = released(), images()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    both = [*model.parameters(), *twin.parameters()]
    assert prepack.bytes_of(both) == prepack.bytes_of(model.parameters())
    want, other = model(x), plain()
    nn.init.normal_(other.blocks[1].mlp.fc1.weight, std=0.2)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), fastvit.accelerate(other)(x))
    assert not torch.allclose(twin(x), want, atol=1e-3)
    assert torch.equal(model(x), want)
    assert len(weights(twin)) == 8
    twin.load_state_dict(model.state_dict(), assign=True)
    assert not weights(twin)
    assert torch.equal(twin(x), want)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@torch.no_grad()
def test_pickles_and_checkpoints_hold_the_numbers(dtype):
    model, x = released(dtype), images().to(dtype)
    want, buffer = model(x), io.BytesIO()
    loaded = pickle.loads(pickle.dumps(model))
    assert not weights(loaded)
    assert torch.equal(loaded(x), want)
    assert same(loaded.state_dict(), model.state_dict())
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = plain(dtype)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fastvit.accelerate(fresh)(x), want)


@torch.no_grad()
def test_conversions_give_the_originals_back():
    model, state = released(), plain().state_dict()
    for unchanged in (model.float, model.cpu, lambda: model.to("cpu", torch.float32), model.eval):
        unchanged()
        assert len(weights(model)) == 8
    model(images())
    model.bfloat16()
    assert not weights(model)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert same(model.state_dict(), {name: t.bfloat16() for name, t in state.items()})
    x = images().bfloat16()
    assert torch.equal(model(x), fastvit.accelerate(plain().bfloat16())(x))
    there = copy.deepcopy(released()).to("meta")
    assert all(p.is_meta for p in there.parameters())
    with torch.inference_mode():
        assert len(weights(released().float())) == 8
        wide = released().double()
        assert same(wide.state_dict(), {name: t.double() for name, t in state.items()})


def hooked(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)


def dropped(model: nn.Module) -> None:
    model.train().blocks[1].attn.proj_drop.p = 0.5


def path_dropped(model: nn.Module) -> None:
    model.train().blocks[1].drop_path1 = timm.layers.DropPath(0.5)


FALLBACKS = {
    "grad": (lambda model: torch.enable_grad(), lambda model, x: model(x)),
    "reference": (lambda model: fastvit.backend("reference"), lambda model, x: model(x)),
    "triton": (lambda model: fastvit.backend("triton"), lambda model, x: model(x)),
    "hook": (hooked, lambda model, x: model(x)),
    "dropout": (dropped, lambda model, x: model(x)),
    "drop path": (path_dropped, lambda model, x: model(x)),
    "mask": (None, lambda model, x: model.blocks[0](torch.randn(2, 17, 96), attn_mask=torch.randn(2, 1, 17, 17))),
    "child": (None, lambda model, x: model.blocks[0].attn(torch.randn(2, 17, 96))),
    "linear": (None, lambda model, x: model.blocks[0].mlp.fc1(torch.randn(2, 17, 96))),
    "arithmetic": (None, lambda model, x: model.blocks[0].mlp.fc1.weight * 2),
    "in place": (None, lambda model, x: model.blocks[0].mlp.fc1.weight.mul_(2)),
    "data": (None, lambda model, x: model.blocks[0].mlp.fc1.weight.data),
    "shared memory": (None, lambda model, x: model.share_memory()),
    "numpy": (None, lambda model, x: torch.from_dlpack(model.blocks[0].mlp.fc1.weight)),
    "optimizer": (None, lambda model, x: torch._foreach_mul_(weights(model), 2.0)),
    "conversion that is differentiated": (None, lambda model, x: differentiated(model)),
    "export": (None, lambda model, x: torch.export.export(model, (x,), strict=False).module()(x)),
}


def differentiated(model: nn.Module) -> Tensor:
    with torch.enable_grad():
        return weights(model)[0].bfloat16()


@pytest.mark.parametrize("make", [plain, ours])
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_would_compute_with_an_original_says_so(name, make):
    if name == "triton" and not fastvit.is_available("triton"):
        pytest.skip("GPU: triton is absent")
    model, x = released(make=make), images()
    before, call = FALLBACKS[name]
    with torch.no_grad():
        want = model(x)
        context = None if before is None else before(model)
        with context or torch.no_grad(), pytest.raises(RuntimeError, match=GONE):
            call(model, x)
        for module in model.modules():
            module._forward_hooks.clear()
        assert torch.equal(model.eval()(x), want)  # nothing was changed on the way


@torch.no_grad()
def test_what_says_something_else():
    model, x = released(), images()
    with pytest.raises(TypeError, match="dtype"):
        model(x.bfloat16())
    with pytest.raises(TypeError, match="dtype"):
        model.blocks[0](torch.randn(2, 17, 96).double())
    model.blocks[1].mlp.act = nn.SiLU()
    with pytest.raises(RuntimeError, match=f"fastvit.linear: weight {GONE}"):
        model(x)
    with pytest.raises(RuntimeError, match=f"fastvit.linear: weight {GONE}"):
        ops.linear(torch.randn(3, 96), weights(model)[0])
    with pytest.raises(RuntimeError, match=f"aten.*{GONE}"):
        F.linear(torch.randn(3, 96), weights(model)[0])


@torch.no_grad()
def test_under_autocast_products_are_bfloat16():
    model, normal, x = released(), fastvit.accelerate(plain()), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), normal(x))
    assert torch.equal(model(x), normal(x))


@pytest.mark.parametrize("fullgraph", [False, True])
@torch.no_grad()
def test_in_a_graph(fullgraph):
    torch._dynamo.reset()
    gc.collect()  # the models of other tests
    model, x = released(), images()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    want, count = model(x), len(prepack._encoders)
    assert torch.equal(compiled(x), want)
    assert len(prepack._encoders) == count
    other = plain()
    nn.init.normal_(other.blocks[1].mlp.fc1.weight, std=0.2)
    model.load_state_dict(other.state_dict())
    assert torch.equal(compiled(x), fastvit.accelerate(other)(x))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="released in float32 cannot"):
        compiled(x)


@pytest.mark.parametrize("make", [plain, ours])
def test_what_cannot_be_released(make):
    with pytest.raises(ValueError, match=r"release_original=True, but .* no block of VisionTransformer: .*float64"):
        released(torch.float64, make)
    with pytest.raises(ValueError, match="normalises queries and keys"):
        released(qk_norm=True)
    with pytest.raises(ValueError, match="it has no fused block"):
        fastvit.accelerate(plain(), mlp=False, release_original=True)
    model = make()
    model.blocks[0].attn.proj.register_forward_hook(lambda *_: None)
    fastvit.accelerate(model, release_original=True)
    assert len(weights(model)) == 4
    model = make()
    model.other = nn.Linear(96, 96)
    model.other.weight = model.blocks[1].attn.proj.weight  # a weight that somebody else computes with
    model.blocks[0].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight  # one that two blocks share
    model.blocks[0].attn.proj.weight.requires_grad_(False)
    fastvit.accelerate(model, release_original=True)
    assert len(weights(model)) == 6
    assert model.blocks[0].mlp.fc1.weight is model.blocks[1].mlp.fc1.weight
    fastvit.restore(model)
    assert model.blocks[0].mlp.fc1.weight is model.blocks[1].mlp.fc1.weight
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["blocks.0.attn.proj.weight"]


@torch.no_grad()
def test_accelerated_releases_inside_alone_or_again():
    model, x = plain(), images()
    with fastvit.accelerated(model, release_original=True):
        assert len(weights(model)) == 8
    assert not weights(model)
    fastvit.accelerate(model, release_original=True)
    want = model(x)
    with fastvit.accelerated(model), torch.enable_grad():
        model(x).sum().backward()
    assert len(weights(model)) == 8
    assert torch.equal(model(x), want)


@torch.no_grad()
def test_int8_keeps_the_original_unless_told_otherwise():
    model, x, state = released(), images(), plain().state_dict()
    normal = fastvit.accelerate(plain())
    for m in (model, normal):
        fastvit.quantize(m, threshold=float("inf"))
    want = normal(x)
    assert torch.equal(model(x), want)
    assert same(model.state_dict(), state)
    assert same(fastvit.restore(copy.deepcopy(model)).state_dict(), state)
    before = prepack.bytes_of(model.parameters())
    fastvit.quantize(model, threshold=float("inf"), release_original=True)
    assert torch.equal(model(x), want)
    assert prepack.bytes_of(model.parameters()) < 0.3 * before
    assert torch.equal(copy.deepcopy(model)(x), want)
    for call in (model.state_dict, lambda: pickle.dumps(model), copy.deepcopy(model).bfloat16):
        with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.\w+\.weight: the original was released"):
            call()
    for call in (fastvit.restore, fastvit.accelerate, fastvit.quantize):
        with pytest.raises(RuntimeError, match=r"originals of 8 layers .*: blocks.0.attn.qkv.weight, .*fc2.weight$"):
            call(model)
        assert torch.equal(model(x), want)
    model.load_state_dict(state)
    assert same(model.state_dict(), state)
    assert torch.equal(model(x), want)
    fastvit.restore(model)
    assert same(model.state_dict(), state)


# What prepack does when threads meet, and when numbers change


@torch.no_grad()
def test_threads_that_pack_at_once_make_one_copy(monkeypatch):
    model, made, of = fastvit.accelerate(plain(depth=6)), [], prepack._copy
    for p in model.parameters():
        p.mul_(1.01)  # no other test's copies

    def slow(tensor: Tensor, kind: str, make) -> Tensor:
        return of(tensor, kind, lambda: (time.sleep(1e-3), made.append(tensor.dim()), make())[-1])

    monkeypatch.setattr(prepack, "_copy", slow)
    start, results = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        with torch.inference_mode():
            results.append(model(images()))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    want = fastvit.accelerate(model, release_original=True)(images())
    assert len(results) == 8
    assert all(torch.equal(y, want) for y in results)
    assert made.count(2) == 2 * 24  # of the originals, and to release them


@torch.no_grad()
def test_content_that_has_changed_is_forgotten():
    model, counts = fastvit.accelerate(plain()), set()
    for _ in range(5):
        for p in model.parameters():
            p.mul_(0.98)
        model(images())
        counts.add(len(prepack._by_content))
    assert len(counts) == 1
