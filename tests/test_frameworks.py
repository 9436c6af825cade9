"""Around an accelerated model: checkpointing, copies, DDP, FSDP2, autocast, functional calls, hooks, neighbours."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from compatibility import BLOCK, case, floats, forward, ratio, trained
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastvit
from fastvit import backends

NAMES = ("timm: DINOv2, registers", "transformers: DINOv2", "transformers: ViT", "torchvision: ViT")
each = pytest.mark.parametrize("name", NAMES)


def blocks_of(model):
    """The encoder blocks by name, first to last."""
    return {n: m for n, m in model.named_modules() if BLOCK.search(n)}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def assert_right(name, model):
    """Outputs and gradients of an accelerated model keep the tolerance rule."""
    given = case(name)
    stick, slopes = given.outputs(torch.float32), given.gradients()
    ratio(forward(model.eval(), given.inputs), stick.exact, stick.eager)
    ratio(trained(model.train(), given.inputs), slopes.exact, slopes.eager, gradient=True)


def bytes_kept(model, inputs):
    """What autograd keeps from a forward pass for the backward one."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return kept


@pytest.mark.parametrize(
    ("name", "reentrant"), [(NAMES[0], False), *((name, r) for name in NAMES[1:3] for r in (False, True))]
)
def test_gradient_checkpointing(name, reentrant):
    given = case(name)
    model = given.accelerated().train()
    want, before = trained(model, given.inputs), bytes_kept(model, given.inputs)
    if name.startswith("transformers"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inputs = {n: x.clone().requires_grad_(reentrant) for n, x in given.inputs.items()}
    else:
        model.set_grad_checkpointing()
        inputs = given.inputs
    assert bytes_kept(model, inputs) < 0.5 * before
    assert_same(backward(model, inputs), want)


def backward(model, inputs):
    """Gradients by ``Tensor.backward``, which reentrant checkpointing and wrappers with hooks need."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(11)
    total = torch.zeros((), dtype=torch.float64)
    for y in floats(model(**inputs)).values():
        total = total + (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum().double()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@each
def test_copies_and_pickles(name):
    given = case(name)
    model = given.accelerated()
    want = forward(model, given.inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for twin in copies:
        assert [row.fused for row in fastvit.report(twin)] == [row.fused for row in fastvit.report(model)]
        assert_same(forward(twin, given.inputs), want)
        assert_same(forward(fastvit.restore(twin), given.inputs), forward(given.copy(), given.inputs))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each
def test_ddp(name, one_process):
    given = case(name)
    model = given.accelerated().train()
    want = backward(model, given.inputs)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    assert_same({n.removeprefix("module."): g for n, g in backward(wrapped, given.inputs).items()}, want)


def full(sharded):
    return {name: gradient.full_tensor() for name, gradient in sharded.items()}


@pytest.mark.parametrize("first", ["accelerate", "shard"])
@each
def test_fsdp2(name, first, one_process):
    given = case(name)
    model, mesh = given.copy(), init_device_mesh("cpu", (1,))
    if first == "accelerate":
        fastvit.accelerate(model)
    for block in blocks_of(model).values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if first == "shard":
        fastvit.accelerate(model)
    fused = {row.name for row in fastvit.report(model) if row.fused}
    assert set(blocks_of(model)) <= fused
    stick, slopes = given.outputs(torch.float32), given.gradients()
    got = forward(model, given.inputs)
    ratio(got, stick.exact, stick.eager)
    found = backward(model.train(), given.inputs)
    ratio(full(found), slopes.exact, slopes.eager, gradient=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    moved = forward(model.eval(), given.inputs)
    plain = given.copy()
    with torch.no_grad():
        for n, p in plain.named_parameters():
            if n in found:
                p.sub_(0.1 * found[n].full_tensor())
    for key, want in forward(plain, given.inputs).items():
        assert torch.allclose(moved[key], want, atol=1e-4)
        assert not torch.allclose(got[key], want, atol=1e-2)


@each
def test_fsdp2_in_mixed_precision(name, one_process):
    given = case(name)
    model, mesh = given.accelerated().train(), init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks_of(model).values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    exact = given.gradients().exact
    found = backward(model, given.inputs)
    assert {g.dtype for g in found.values()} == {torch.float32}
    got, want = (torch.cat([t[n].flatten().double() for n in exact]) for t in (full(found), exact))
    assert (got - want).norm() < 0.05 * want.norm()


@each
def test_autocast(name):
    given = case(name)
    model = given.copy()

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(model, given.inputs)

    eager = run()
    fastvit.accelerate(model)
    got = run()
    assert {n: y.dtype for n, y in got.items()} == {n: y.dtype for n, y in eager.items()}
    exact = given.outputs(torch.float32).exact
    for key, y in got.items():
        error, yardstick = (y - exact[key]).abs().max(), (eager[key] - exact[key]).abs().max()
        assert error <= 2 * yardstick + 1e-5, key
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = trained(model.train(), given.inputs)
    assert {g.dtype for g in grads.values()} == {torch.float32}


@each
def test_functional_call_and_inference_mode(name):
    given = case(name)
    model = given.accelerated()
    forward(model, given.inputs)  # so that everything which can be kept between calls is
    other = {n: p + 0.05 * torch.randn_like(p) for n, p in given.model.named_parameters()}
    moved = copy.deepcopy(given.model)
    moved.load_state_dict(other, strict=False)
    want = forward(fastvit.accelerate(moved), given.inputs)
    before = forward(model, given.inputs)
    with torch.no_grad():
        got = floats(torch.func.functional_call(model, other, (), given.inputs))
    assert_same(got, want)
    assert_same(forward(model, given.inputs), before)
    with torch.inference_mode():
        assert_same(floats(model(**given.inputs)), before)


@each
def test_steps_of_an_optimizer_are_seen(name):
    given = case(name)
    model, plain = given.accelerated(), given.copy()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    for _ in range(2):
        forward(model.eval(), given.inputs)
        for each_model, optimizer in zip((model, plain), optimizers, strict=True):
            backward(each_model.train(), given.inputs)
            optimizer.step()
    for key, want in forward(plain.eval(), given.inputs).items():
        assert torch.allclose(forward(model.eval(), given.inputs)[key], want, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(want, forward(given.copy(), given.inputs)[key], atol=5e-2)


def test_compile_of_a_model_that_never_ran(monkeypatch):
    """Kernels are loaded while the graph is traced, and numbers of modules may be symbols in it."""
    for key in [key for key in vars(backends.Loaded) if not key.startswith("_")]:
        monkeypatch.delattr(backends.Loaded, key)
    given = case("timm: DINOv3")
    model = given.accelerated()
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = {n: torch.cat([t, t])[:batch] for n, t in given.inputs.items()}
        assert_same(forward(graph, inputs), forward(model, inputs))


@pytest.mark.parametrize("when", ["before", "after"])
@each
def test_hooks_on_children_keep_their_block_eager_and_fire(name, when):
    given = case(name)
    model, seen = given.copy(), []
    first, second = blocks_of(model)
    linear = next(m for m in model.get_submodule(first).modules() if type(m) is torch.nn.Linear)

    def add():
        linear.register_forward_hook(lambda *_: seen.append(1))

    if when == "before":
        add()
    fastvit.accelerate(model)
    if when == "after":
        add()
    rows = {row.name: row for row in fastvit.report(model)}
    assert not rows[first].fused
    assert "hook" in rows[first].reason
    assert rows[second].fused
    assert_right(name, model)
    assert len(seen) >= 2


@each
def test_neighbours_of_the_same_class_are_left_alone(name):
    given = case(name)
    first, second, third = given.copy(), given.copy(), given.copy()
    classes = {type(m): type(m).__dict__.get("forward") for m in first.modules()}
    calls = {kind: kind.__call__ for kind in classes}
    want = forward(second, given.inputs)
    fastvit.accelerate(first)
    fastvit.accelerate(third)
    fused = forward(third, given.inputs)
    assert not any("forward" in m.__dict__ for m in second.modules())
    assert_same(forward(second, given.inputs), want)
    fastvit.restore(first)
    assert_same(forward(first, given.inputs), want)
    assert_same(forward(third, given.inputs), fused)
    assert all(kind.__dict__.get("forward") is f and kind.__call__ is calls[kind] for kind, f in classes.items())


@pytest.mark.parametrize("name", ["transformers: ViT", "transformers: DINOv2", "transformers: BEiT"])
def test_images_of_another_size(name):
    given = case(name)
    images = torch.randn(2, 3, 48, 56)
    exact = given.copy(torch.float64)
    options = {} if "DINO" in name else {"interpolate_pos_encoding": True}

    def run(model, x):
        with torch.no_grad():
            return floats(model(pixel_values=x, **options))

    ratio(run(given.accelerated(), images), run(exact, images.double()), run(given.copy(), images))
