"""attention_maps: the softmax that eager models compute, out of models that stay fused."""

import copy

import pytest
import torch
from models import SMALL, images, randomize, small_timm, timm
from tolerances import assert_close
from torch import nn

import fastvit
from fastvit import maps
from fastvit.fused import MARK
from fastvit.integrations import Options


def prepared(model, dtype, accelerated):
    model = copy.deepcopy(model).to(dtype)
    return fastvit.accelerate(model) if accelerated else model


def timm_softmax(model, x, **kwargs):
    """What timm's unfused attention hands to its dropout, of each block."""
    model, found = copy.deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: found.append(args[0]))
    with torch.no_grad():
        model(x, **kwargs)
    return found


def check(name, model, softmax, x, dtype, accelerated, **kwargs):
    """Maps of all rows against the library's own softmax in this dtype, by fp64."""
    low, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    eager = softmax(low, x, **kwargs)
    exact = softmax(copy.deepcopy(low).double(), x.double(), **kwargs)
    found = fastvit.attention_maps(prepared(model, dtype, accelerated), x, queries="all", **kwargs)
    assert len(found) == len(eager) > 1
    for layer, (got, base, want) in enumerate(zip(found, eager, exact, strict=True)):
        assert got.dtype == torch.float32
        assert_close(f"{name}, layer {layer}", got.to(dtype), want, base)
        torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:-1]))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ACCELERATED = pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
OPTIONS = [
    {},
    {"init_values": 0.1, "reg_tokens": 2},
    {"qk_norm": True, "qkv_bias": False, "class_token": False, "global_pool": "avg"},
]


@DTYPES
@ACCELERATED
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_timm(options, accelerated, dtype):
    check("timm", small_timm(**options), timm_softmax, images(), dtype, accelerated)


@ACCELERATED
def test_masks_and_causal_order(accelerated):
    model, x = small_timm(), images()
    hidden = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(3)) > 0.3
    hidden |= torch.eye(17, dtype=torch.bool)
    bias = torch.randn(1, 3, 17, 17, generator=torch.Generator().manual_seed(4))
    padding = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    padding[1, ..., 11:] = False
    for mask in (hidden, bias, padding):
        check("mask", model, timm_softmax_with_mask, x, torch.float32, accelerated, attn_mask=mask)
    fused = prepared(model, torch.float32, accelerated)
    for rows in ([5, 0], "all"):
        few = fastvit.attention_maps(fused, x, queries=rows, attn_mask=bias)
        all_rows = timm_softmax_with_mask(model, x, attn_mask=bias)
        for got, want in zip(few, all_rows, strict=True):
            torch.testing.assert_close(got, want if rows == "all" else want[:, :, rows])
    ours = fastvit.VisionTransformer(**SMALL)
    ours.load_state_dict(model.state_dict())
    lower = torch.ones(17, 17, dtype=torch.bool).tril()
    for given in ({"is_causal": True}, {"attn_mask": lower}):
        causal = fastvit.attention_maps(ours, x, queries=[2, 9, 16], **given)
        for got, want in zip(causal, timm_softmax_with_mask(model, x, attn_mask=lower), strict=True):
            torch.testing.assert_close(got, want[:, :, [2, 9, 16]])
    lower[4] = False
    assert not fastvit.attention_maps(ours, x, layers=0, queries=4, attn_mask=lower)[0].any()


def timm_softmax_with_mask(model, x, attn_mask):
    """timm adds any mask to the scores: a boolean one as what it means."""
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=x.dtype).masked_fill(~attn_mask, -torch.inf)
    return timm_softmax(model, x, attn_mask=attn_mask.to(x.dtype))


def test_layers_queries_and_heads():
    model, x = fastvit.accelerate(small_timm(reg_tokens=2)), images()
    every = fastvit.attention_maps(model, x, queries="all")
    tokens, prefix = 3 + 16, 3
    assert [tuple(one.shape) for one in every] == [(2, 3, tokens, tokens)] * 3
    for queries, rows in (
        ("cls", [0]),
        (4, [4]),
        (-1, [tokens - 1]),
        ([7, 7, 0], [7, 7, 0]),
        (range(2), [0, 1]),
        ([(0, 0), (3, 1)], [prefix, prefix + 13]),
    ):
        for got, want in zip(fastvit.attention_maps(model, x, queries=queries), every, strict=True):
            torch.testing.assert_close(got, want[:, :, rows])
    for layers, wanted in ((1, [1]), (-1, [2]), ([2, 0], [2, 0]), ([1, -2], [1, 1]), (range(3), [0, 1, 2])):
        found = fastvit.attention_maps(model, x, layers, "all")
        assert all(torch.equal(got, every[i]) for got, i in zip(found, wanted, strict=True))
    for heads, wanted in ((1, [1]), ([-1, 0], [2, 0])):
        for got, want in zip(fastvit.attention_maps(model, x, queries=5, heads=heads), every, strict=True):
            torch.testing.assert_close(got, want[:, wanted, 5:6])
    bias = torch.randn(1, 3, tokens, tokens)
    alone = fastvit.attention_maps(model, x, queries=[6, 2], heads=[2], attn_mask=bias)
    among = fastvit.attention_maps(model, x, queries=[6, 2], attn_mask=bias)
    for one, several in zip(alone, among, strict=True):
        torch.testing.assert_close(one, several[:, 2:])
    mean = fastvit.attention_maps(model, x, heads="mean")[1]
    torch.testing.assert_close(mean, every[1].mean(1, keepdim=True)[:, :, :1])


def test_patches_of_an_image_that_is_not_square():
    model = fastvit.VisionTransformer(**{**SMALL, "img_size": (24, 40)})
    x = torch.randn(1, 3, 24, 40)
    (found,) = fastvit.attention_maps(model, x, 0, [(2, 4), (1, 0)])
    (wanted,) = fastvit.attention_maps(model, x, 0, [15, 6])
    assert torch.equal(found, wanted)


def test_no_more_than_the_rows_asked_for_is_computed(monkeypatch):
    model, x, largest = fastvit.accelerate(small_timm()), images(), []
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append((a.shape, b.shape)) or multiply(a, b))
    fastvit.attention_maps(model, x, layers=[0, 2])
    assert largest == [((2, 3, 1, 16), (2, 3, 16, 17))] * 2


@ACCELERATED
def test_the_model_stays_as_it_is_and_fused(accelerated, monkeypatch):
    model = prepared(small_timm(), torch.float32, accelerated)
    x = images()
    before = model(x)
    eager = []
    linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: eager.append(self) or linear(self, x))
    found = fastvit.attention_maps(model, x)
    inside = {id(module) for block in model.blocks for module in block.modules()}
    assert accelerated != bool(inside & {id(module) for module in eager})
    assert torch.equal(model(x), before)
    assert torch.equal(found[2], fastvit.attention_maps(model, x)[2])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    if accelerated:
        fused = [row.name for row in fastvit.report(model) if row.fused]
        assert {"blocks.0", "blocks.1", "blocks.2"} <= set(fused)
        assert all(MARK in block.__dict__ for block in model.blocks)


def test_our_own_model_and_one_block():
    model = randomize(fastvit.VisionTransformer(**SMALL)).eval()
    twin = small_timm()
    twin.load_state_dict(model.state_dict())
    for got, want in zip(
        fastvit.attention_maps(model, images(), queries="all"), timm_softmax(twin, images()), strict=True
    ):
        torch.testing.assert_close(got, want)
    tokens = model.patch_embed(images(), model.pos_embed, model.cls_token)
    (alone,) = fastvit.attention_maps(model.blocks[0], tokens, queries=[0])
    torch.testing.assert_close(alone, fastvit.attention_maps(model, images())[0])


def test_a_block_that_cannot_be_fused_and_one_with_hooks():
    model = small_timm(mlp_layer=timm.layers.SwiGLUPacked)
    assert "MLP is" in fastvit.integrations.timm.plan(model.blocks[0], Options())
    for accelerate in (False, True):
        if accelerate:
            fastvit.accelerate(model)
        for got, want in zip(
            fastvit.attention_maps(model, images(), queries="all"), timm_softmax(model, images()), strict=True
        ):
            torch.testing.assert_close(got, want)
    hooked, seen = fastvit.accelerate(small_timm()), []
    wanted = fastvit.attention_maps(hooked, images())
    hooked.blocks[1].attn.register_forward_hook(lambda *args: seen.append(1))
    for got, want in zip(fastvit.attention_maps(hooked, images()), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert seen == [1]


@ACCELERATED
def test_autocast_and_fp64(accelerated):
    model, x = prepared(small_timm(), torch.float32, accelerated), images()
    wanted = timm_softmax(copy.deepcopy(fastvit.restore(copy.deepcopy(model))).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = fastvit.attention_maps(model, x, queries="all")
        eager = timm_softmax(fastvit.restore(copy.deepcopy(model)), x)
    for got, want, base in zip(found, wanted, eager, strict=True):
        assert got.dtype == torch.float32
        assert_close("autocast", got.to(base.dtype), want, base)
    double = fastvit.attention_maps(prepared(model, torch.float64, accelerated), x.double(), queries="all")
    for got, want in zip(double, wanted, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want)


def test_training_leaves_the_softmaxs_dropout_out():
    model, x = fastvit.accelerate(small_timm(attn_drop_rate=0.5)).train(), images()
    (found,) = fastvit.attention_maps(model, x, layers=0, queries="all")
    torch.testing.assert_close(found, timm_softmax(model.eval(), x)[0])
    assert model.training is False


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_request(checkpointing):
    model, x = fastvit.accelerate(small_timm()).train(), images().requires_grad_()
    assert not any(one.requires_grad for one in fastvit.attention_maps(model, x))
    model.set_grad_checkpointing(checkpointing)
    found = fastvit.attention_maps(model, x, queries=[0, 3], grad=True)
    dy = [torch.randn_like(one) for one in found]
    loss = sum((one * d).sum() for one, d in zip(found, dy, strict=True))
    loss.backward()
    exact = small_timm().double()
    rows = []
    for block in exact.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: rows.append(args[0][:, :, [0, 3]]))
    y = images().double().requires_grad_()
    exact(y)
    sum((one * d).sum() for one, d in zip(rows, dy, strict=True)).backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-5)
    qkv, wanted = model.blocks[1].attn.qkv.weight.grad, exact.blocks[1].attn.qkv.weight.grad
    torch.testing.assert_close(qkv.double(), wanted, rtol=1e-3, atol=1e-5)


def test_wrapped_compiled_and_released_models():
    model, x = fastvit.accelerate(small_timm()), images()
    wanted = fastvit.attention_maps(model, x)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    with torch.no_grad():
        compiled(x)
    inside = nn.ModuleDict({"tower": model})
    inside.forward = lambda image: inside["tower"](image)
    for wrapped in (compiled, inside):
        for got, want in zip(fastvit.attention_maps(wrapped, x), wanted, strict=True):
            torch.testing.assert_close(got, want)
    if "cpu" in fastvit.report(model)[1].ops.values():
        fastvit.accelerate(model, release_original=True)
        for got, want in zip(fastvit.attention_maps(model, x), wanted, strict=True):
            torch.testing.assert_close(got, want)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = small_timm()
        self.rest = nn.Identity()

    def forward(self, x):
        return self.rest(self.vit(x) + self.vit(x))


class Failing(nn.Module):
    def forward(self, x):
        raise ArithmeticError("on purpose")


def test_hooks_are_gone_after_an_exception():
    model = fastvit.accelerate(small_timm())
    model.norm = Failing()
    twice = Twice()
    with pytest.raises(ArithmeticError, match="on purpose"):
        fastvit.attention_maps(model, images())
    with pytest.raises(RuntimeError, match=r"block vit\.blocks\.0 is called more than once"):
        fastvit.attention_maps(twice, images())
    with pytest.raises(ValueError, match=r"queries must be in -17\.\.16, got \[17\]"):
        fastvit.attention_maps(twice.vit, images(), queries=[17])
    modules = [*model.modules(), *twice.modules()]
    assert not any(module._forward_pre_hooks for module in modules)


def two_towers():
    return nn.ModuleDict({"image": small_timm(), "text": small_timm()})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": "vit"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "no block of timm, transformers, torchvision or fastvit"),
        ({"model": two_towers}, ValueError, r"blocks at 2 places, image\.blocks, text\.blocks"),
        ({"layers": 3}, ValueError, r"layers must be in -3\.\.2, got 3"),
        ({"layers": [0, -4]}, ValueError, r"layers must be in -3\.\.2"),
        ({"layers": []}, ValueError, "layers must be in"),
        ({"layers": 1.0}, TypeError, "layers must be an integer or integers, got 1.0"),
        ({"queries": "class"}, ValueError, "queries must be 'cls', 'all' or indices, got 'class'"),
        ({"queries": 1.5}, TypeError, "queries must be an integer or integers, got 1.5"),
        ({"queries": []}, ValueError, "queries must be in"),
        ({"queries": [(4, 0)]}, ValueError, r"of 4 x 4 patches, got \(4, 0\)"),
        ({"queries": [(1, 2, 3)]}, ValueError, "of 4 x 4 patches"),
        ({"heads": 3}, ValueError, r"heads must be in -3\.\.2, got 3"),
        ({"heads": "max"}, ValueError, "heads must be None, 'mean', an index or indices, got 'max'"),
        ({"x": None, "queries": [(0, 0)]}, ValueError, r"x must be images \(B, C, height, width\), got NoneType"),
        ({"model": lambda: small_timm().blocks, "queries": "cls"}, ValueError, "whose embedding is unknown"),
    ],
)
def test_errors(given, error, message):
    arguments = {"model": small_timm, "x": images(), **given}
    if callable(arguments["model"]) and not isinstance(arguments["model"], nn.Module):
        arguments["model"] = arguments["model"]()
    with pytest.raises(error, match=message):
        fastvit.attention_maps(**arguments)


def test_an_unknown_block_among_known_ones_would_shift_their_indices():
    model = small_timm()
    model.blocks[1] = timm.models.vision_transformer.ParallelThingsBlock(48, 3)
    with pytest.raises(ValueError, match=r"ParallelThingsBlock blocks\.1 of VisionTransformer stands among blocks"):
        fastvit.attention_maps(model, images())


def test_quantised_models():
    model, x = small_timm(), images()
    wanted = fastvit.attention_maps(model, x)
    fastvit.quantize(fastvit.accelerate(model))
    for got, want in zip(fastvit.attention_maps(model, x), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.02)


def test_no_class_token():
    model = small_timm(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="which has no class token: give indices of tokens"):
        fastvit.attention_maps(model, images())
    assert fastvit.attention_maps(model, images(), 0, [(0, 1)])[0].shape == (2, 3, 1, 16)


def test_patches_that_were_dropped_have_no_place():
    model = small_timm(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="grid of 4 x 4 behind 1 prefix tokens, but the blocks get 9 tokens"):
        fastvit.attention_maps(model, images(), queries=[(0, 1)])


def test_rotated_queries_go_by_their_own_positions(monkeypatch):
    model, x = small_timm(), images()
    angle = torch.arange(17.0)[:, None] * torch.linspace(0.1, 1.0, 8)

    def turned(t):
        even, odd = t[..., ::2], t[..., 1::2]
        return torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)

    def call(block, x):
        return fastvit.integrations.BlockCall(x, rotate=lambda q, k: (turned(q).flatten(-2), turned(k).flatten(-2)))

    attended = maps._attended
    monkeypatch.setattr(maps, "_attended", lambda m: (a := attended(m)) and a._replace(call=call))
    (found,) = fastvit.attention_maps(model, x, 0, [9, 0, 9])
    block = copy.deepcopy(model.blocks[0]).double()
    inputs = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(x)
    tokens = block.norm1(inputs[0].double())
    q, k, _ = block.attn.qkv(tokens).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    for b, head, (row, i) in [(0, 0, (0, 9)), (1, 2, (1, 0)), (1, 1, (2, 9))]:
        scores = []
        for j in range(17):
            pairs_q, pairs_k = (torch.view_as_complex(t[b, head, n].view(8, 2)) for t, n in ((q, i), (k, j)))
            product = pairs_q * pairs_k.conj() * torch.polar(torch.ones(8).double(), (angle[i] - angle[j]).double())
            scores.append(product.real.sum() / 4)
        torch.testing.assert_close(found[b, head, row].double(), torch.stack(scores).softmax(0), rtol=1e-4, atol=1e-6)
