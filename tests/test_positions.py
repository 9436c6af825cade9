"""Positions: resized by a named way as the library of that name does, and the kinds of the paper's ablation."""

import copy
import math
import pickle

import pytest
import safetensors.torch
import torch
from checkpoint_models import hf, ours, vision
from models import SMALL, randomize, timm
from plain_vit import plain_vit
from tolerances import assert_close

import fastvit
from fastvit import load_checkpoint
from fastvit.fused import attend
from fastvit.parts import attention_parts
from fastvit.resample import WAYS, resample_positions

ndimage = pytest.importorskip("scipy.ndimage")


def by_transformers(table, new, old):
    embeddings = hf("ViTModel", image_size=(8 * old[0], 8 * old[1])).embeddings
    embeddings.position_embeddings.data.copy_(table)
    return embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + new[0] * new[1], 48), 8 * new[0], 8 * new[1])


def by_torchvision(table, new, old):
    assert old[0] == old[1] and new[0] == new[1]
    return vision.interpolate_embeddings(8 * new[0], 8, {"encoder.pos_embedding": table})["encoder.pos_embedding"]


def by_scipy(table, new, old):
    """google-research/vision_transformer's call, for any grid."""
    grid = table[0, 1:].reshape(*old, -1).numpy()
    zoomed = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    return torch.cat([table[:, :1], torch.from_numpy(zoomed).reshape(1, -1, table.shape[-1])], 1)


def cubic(old, new, place):
    """(new, old) in fp64: Keys' cubic convolution with a = -0.75 at place(i), border repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        left = math.floor(place(i))
        for j in range(left - 1, left + 3):
            x = abs(place(i) - j)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if x <= 1 else far if x < 2 else 0.0
    return matrix


def by_formula(place):
    def resize(table, new, old):
        rows, columns = (cubic(o, n, lambda i, o=o, n=n: place(i, o, n)) for o, n in zip(old, new, strict=True))
        grid = torch.einsum("yi,xj,ijd->yxd", rows, columns, table[0, 1:].double().reshape(*old, -1))
        return torch.cat([table[:, :1], grid.float().reshape(1, -1, table.shape[-1])], 1)

    return resize


# way -> what its source computes with, and whether that takes grids that are no squares (old, new)
SOURCES = {
    "timm": ("timm", lambda t, new, old: timm.layers.resample_abs_pos_embed(t, new, old), True, True),
    "transformers": ("transformers", by_transformers, False, True),
    "transformers' formula": ("transformers", by_formula(lambda i, o, n: (i + 0.5) * o / n - 0.5), True, True),
    "torchvision": ("torchvision", by_torchvision, False, False),
    "torchvision's formula": ("torchvision", by_formula(lambda i, o, n: i * (o - 1) / (n - 1)), True, True),
    "dinov2": ("dinov2", by_formula(lambda i, o, n: (i + 0.5) * o / (n + 0.1) - 0.5), True, True),
    "npz": (
        "npz",
        lambda t, new, old: timm.layers.resample_abs_pos_embed(t, new, old, interpolation="bilinear", antialias=False),
        True,
        True,
    ),
    "original": ("original", by_scipy, True, True),
}
GRIDS = [((4, 4), (6, 6)), ((4, 4), (3, 7)), ((4, 4), (2, 8)), ((2, 8), (4, 4)), ((3, 5), (7, 4))]
CASES = [
    pytest.param(name, old, new, id=f"{name} {old} {new}")
    for name, (_, _, any_old, any_new) in SOURCES.items()
    for old, new in GRIDS
    if (any_old or old[0] == old[1]) and (any_new or new[0] == new[1])
]


def bare(grid, **options):
    """A model of no blocks whose tokens are its class token and its positions."""
    sides = (8 * grid[0], 8 * grid[1])
    model = fastvit.VisionTransformer(
        img_size=sides, patch_size=8, embed_dim=48, num_heads=3, depth=0, num_classes=0, final_norm=False, **options
    )
    randomize(model)
    torch.nn.init.zeros_(model.patch_embed.proj.weight)
    torch.nn.init.zeros_(model.patch_embed.proj.bias)
    return model


@pytest.mark.parametrize(("name", "old", "new"), CASES)
def test_every_way_is_its_sources(name, old, new, tmp_path):
    """In set_input_size, by the model's option and by name, at run time, and out of a file."""
    way, source, _, _ = SOURCES[name]
    model = bare(old, pos_resize=way)
    table = model.pos_embed.detach().clone()
    want = source(table.clone(), new, old).detach()
    assert want.shape == (1, 1 + new[0] * new[1], 48)
    image = torch.zeros(1, 3, 8 * new[0], 8 * new[1])
    flexible = bare(old, pos_resize=way, dynamic_img_size=True)
    at_run_time = flexible.forward_features(image) - torch.nn.functional.pad(
        flexible.cls_token, (0, 0, 0, new[0] * new[1])
    )
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    options = {"source_grid": old, "interpolation": way}
    loaded = load_checkpoint(bare(new), tmp_path / "a.safetensors", **options).pos_embed
    model.set_input_size((8 * new[0], 8 * new[1]))
    named = bare(old)
    named.set_input_size((8 * new[0], 8 * new[1]), pos_resize=way)
    for got in (model.pos_embed, named.pos_embed, at_run_time, loaded):
        assert torch.allclose(got, want, atol=2e-6)
        assert got.shape != table.shape or not torch.allclose(got, table, atol=1e-2)


def test_the_ways_differ_and_positions_learn_at_another_size():
    table = bare((4, 4)).pos_embed.detach()
    resized = [resample_positions(table, (6, 5), (4, 4), 1, **way) for way in WAYS.values()]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(resized) for b in resized[:i])
    model = bare((4, 4), dynamic_img_size=True, pos_resize="timm")
    dy = torch.randn(2, 31, 48)
    model.forward_features(torch.zeros(2, 3, 48, 40)).backward(dy)
    leaf = model.pos_embed.detach().clone().requires_grad_()
    timm.layers.resample_abs_pos_embed(leaf, (6, 5), (4, 4)).expand(2, -1, -1).backward(dy)
    assert torch.allclose(model.pos_embed.grad, leaf.grad, atol=1e-5)


# An even number of tokens: of bfloat16 rows of odd length oneDNN reads what lies behind (AMX), in eager PyTorch.
KINDS = {
    "2d": {},
    "2d in a row": {"img_size": (8, 56)},
    "relative": {},
    "relative with norms": {
        "qk_norm": True,
        "init_values": 0.1,
        "class_token": False,
        "global_pool": "avg",
        "reg_tokens": 1,
    },
    "none": {},
    "learn": {"no_embed_class": True},
}


def of_kind(name, **options):
    options = {**SMALL, "depth": 2, "img_size": (24, 40), "reg_tokens": 2, **KINDS[name], **options}
    return randomize(fastvit.VisionTransformer(pos_embed=name.split()[0], **options)).eval()


def positions_of(state, grid):
    """The ablation's positions (N, D) from the parameters, or None."""
    if "pos_embed_x" in state:
        pairs = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
        return torch.stack([torch.cat([state["pos_embed_x"][0, x], state["pos_embed_y"][0, y]]) for y, x in pairs])
    return state["pos_embed"][0] if "pos_embed" in state else None


def plain_features(state, images, grid, **options):
    return torch.stack([plain_vit(state, image, positions_of(state, grid), 3, **options) for image in images])


def leaves_of(model, dtype):
    return {name: p.detach().to(dtype).clone().requires_grad_() for name, p in model.named_parameters()}


def additive(mask, causal, tokens):
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else torch.ones(tokens, tokens).bool()
    added = torch.zeros(tokens, tokens, dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        added = mask.double()
    return added.masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_positions(name, dtype):
    """Tokens and the gradient of every parameter, and the same tokens without gradients, when other kernels run."""
    model = of_kind(name).to(dtype)
    grid = model.patch_embed.grid_size
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1]).to(dtype)
    found = []
    for its in (torch.float64, dtype):
        leaves = leaves_of(model, its)
        features = plain_features(leaves, images.to(its), grid)
        dy = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(its)
        features.backward(dy)
        found.append((features, {key: leaf.grad for key, leaf in leaves.items()}))
    (exact, exact_grads), (eager, eager_grads) = found
    got = model.forward_features(images)
    assert_close("tokens", got, exact, eager)
    got.backward(dy.to(dtype))
    tables = [key for key, _ in model.named_parameters() if "pos_embed" in key or "relative" in key]
    assert len(tables) == {"2d": 2, "relative": 2, "none": 0, "learn": 1}[name.split()[0]]
    for key, parameter in model.named_parameters():
        if exact_grads[key] is not None and not key.endswith("k_norm.bias"):  # which shifts all scores alike
            assert_close(f"gradient of {key}", parameter.grad, exact_grads[key], eager_grads[key], gradient=True)
    with torch.no_grad():
        assert_close("tokens without gradients", model.forward_features(images), exact, eager)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", None])
def test_relative_logits_join_the_mask(kind, causal):
    model = of_kind("relative")
    x = torch.randn(1, 3, 24, 40)
    mask = {"bool": torch.rand(18, 18) > 0.4, "float": torch.randn(18, 18), None: None}[kind]
    if kind == "bool":
        mask[:, 0] = True
    added = additive(mask, causal, 18)
    exact = plain_features(leaves_of(model, torch.float64), x.double(), (3, 5), mask=added)
    eager = plain_features(leaves_of(model, torch.float32), x, (3, 5), mask=added.float())
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert_close("tokens", model.forward_features(x, mask, causal), exact, eager)


def test_no_fused_path_leaves_the_relative_logits_out():
    model = of_kind("relative")
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        want = plain_features(leaves_of(model, torch.float64), x.double(), (3, 5)).float()
        without = of_kind("none")
        without.load_state_dict(model.state_dict(), strict=False)
        assert not torch.allclose(without.forward_features(x), want, atol=1e-2)
        hooked = copy.deepcopy(model)
        hooked.blocks[0].attn.register_forward_hook(lambda *_: None)
        ways = [model, copy.deepcopy(model), hooked, fastvit.accelerate(copy.deepcopy(model))]
        ways += [fastvit.restore(fastvit.accelerate(copy.deepcopy(model))), pickle.loads(pickle.dumps(model))]
        for way in ways:
            for name in ("auto", "reference"):
                with fastvit.backend(name):
                    assert torch.allclose(way.forward_features(x), want, atol=1e-4)
            checkpointed = way.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
            assert torch.allclose(checkpointed[-1], want[:, 3:], atol=1e-4)
    with pytest.raises(ValueError, match="has relative positions"):
        fastvit.accelerate(model, release_original=True)


def test_maps_hold_the_relative_logits():
    model = of_kind("relative", depth=1)
    x = torch.randn(1, 3, 24, 40)
    parts = attention_parts(model.blocks[0].attn)
    (maps,) = fastvit.attention_maps(model, x, queries="all")
    (some,) = fastvit.attention_maps(model, x, queries=[3, 16], heads=1)
    assert torch.allclose(some, maps[:, 1:2, [3, 16]], atol=1e-6)
    with torch.no_grad():
        qkv = model.blocks[0].attn.qkv(model.blocks[0].norm1(model._embed(x)))
        qkv[..., 96:] = torch.eye(18, 16).repeat(1, 3)  # values that show the softmax of the first 16 keys
        shown = attend(parts, qkv)[0].unflatten(1, (3, 16)).transpose(0, 1)
    assert torch.allclose(shown, maps[0, ..., :16], atol=1e-5)


def test_2d_tables_are_resized_each_on_its_own():
    model = of_kind("2d")
    x, y = model.pos_embed_x.detach().clone(), model.pos_embed_y.detach().clone()
    flexible = of_kind("2d", dynamic_img_size=True)
    image = torch.randn(1, 3, 48, 24)
    with torch.no_grad():
        at_run_time = flexible.forward_features(image)
    model.set_input_size((48, 24), pos_resize="timm")
    for got, table, n in ((model.pos_embed_x, x, 3), (model.pos_embed_y, y, 6)):
        want = timm.layers.resample_abs_pos_embed(table, (1, n), (1, table.shape[1]), num_prefix_tokens=0)
        assert torch.allclose(got, want, atol=1e-6)
    exact = plain_features(leaves_of(model, torch.float64), image.double(), (6, 3))
    eager = plain_features(leaves_of(model, torch.float32), image, (6, 3))
    for got in (at_run_time, model.forward_features(image)):
        assert_close("tokens", got, exact, eager)


@pytest.mark.parametrize("name", ["2d", "relative"])
def test_kinds_start_and_are_kept_as_positions_are(name, tmp_path):
    model = fastvit.VisionTransformer(**SMALL, pos_embed=name)
    tables = [p for key, p in model.named_parameters() if "pos_embed" in key or "relative" in key]
    assert all(0.01 < table.std() < 0.03 for table in tables)
    decays = model.no_weight_decay()
    assert {key for key, p in model.named_parameters() if any(p is table for table in tables)} <= decays
    assert not any("attn.qkv" in key for key in decays)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    again = load_checkpoint(fastvit.VisionTransformer(**SMALL, pos_embed=name), tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_errors():
    for options, words in (
        ({"pos_embed": "3d"}, "pos_embed must be one of"),
        ({"pos_resize": "scipy"}, r"pos_resize must be one of \('timm', 'transformers'"),
        ({"pos_embed": "2d", "embed_dim": 51}, "embed_dim must be even for pos_embed='2d', got 51"),
        ({"pos_embed": "relative", "dynamic_img_size": True}, "'relative' goes with neither dynamic_img_size"),
        ({"pos_embed": "relative", "patch_drop_rate": 0.1}, "nor patch_drop_rate"),
    ):
        with pytest.raises(ValueError, match=words):
            fastvit.VisionTransformer(**{**SMALL, **options})
    model = of_kind("relative")
    with pytest.raises(
        ValueError, match=r"relative positions are distances in a sequence of 3 x 5 patches .* in 5 x 3"
    ):
        model.set_input_size((40, 24))
    with pytest.raises(ValueError, match=r"pos_resize must be one of .*, got 'nearest'"):
        ours().set_input_size(48, pos_resize="nearest")
    model = ours()
    with pytest.raises(ValueError, match="img_size must hold at least one patch"):
        model.set_input_size((4, 64))
    assert model.patch_embed.grid_size == (4, 4)
    model = of_kind("relative")
    with pytest.raises(ValueError, match="relative positions are learned for 18 tokens, got 11"):
        model.blocks[0](torch.randn(1, 11, 48))
