"""The paper's analyses against loops over their definitions, on sizes where these take no time."""

import math

import numpy as np
import pytest
import torch
from models import images, randomize, small_timm, timm

import fastvit
from fastvit import analysis

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")


def some_maps(layers=3, batch=2, heads=2, tokens=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(layers, batch, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    return [*scores.softmax(-1).to(dtype)]


def multiplied(a, b):
    rows, inner, columns = len(a), len(b), len(b[0])
    return [[sum(a[i][k] * b[k][j] for k in range(inner)) for j in range(columns)] for i in range(rows)]


def test_rollout_is_the_product_over_layers():
    maps = some_maps()
    found = analysis.attention_rollout(maps)
    assert found.dtype == torch.float64
    for image in range(2):
        product = [[float(i == j) for j in range(7)] for i in range(7)]
        for layer in maps:
            mean = [[float(layer[image, :, i, j].sum()) / 2 for j in range(7)] for i in range(7)]
            step = [[0.5 * mean[i][j] + 0.5 * (i == j) for j in range(7)] for i in range(7)]
            product = multiplied(step, product)
        np.testing.assert_allclose(found[image].numpy(), product, rtol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 7).double())


def test_rollout_of_a_model_is_that_of_its_maps():
    model, x = fastvit.accelerate(small_timm(reg_tokens=1)), images()
    found = analysis.attention_rollout(model, x)
    torch.testing.assert_close(found, analysis.attention_rollout(fastvit.attention_maps(model, x, queries="all")))
    assert found.dtype == torch.float32
    bias = torch.randn(18, 18)
    masked = analysis.attention_rollout(model, x, attn_mask=bias)
    torch.testing.assert_close(
        masked, analysis.attention_rollout(fastvit.attention_maps(model, x, queries="all", attn_mask=bias))
    )


def test_distance_is_the_weighted_mean_over_patches():
    rows, columns, p, q, prefix = 2, 3, 4, 5, 1
    maps = some_maps(tokens=prefix + rows * columns)
    found = analysis.attention_distance(maps, (rows, columns), (p, q))
    assert found.shape == (3, 2)
    for layer in range(3):
        for head in range(2):
            means = []
            for image in range(2):
                for i in range(6):
                    far = weights = 0.0
                    for j in range(6):
                        weight = float(maps[layer][image, head, prefix + i, prefix + j])
                        down, right = p * (i // columns - j // columns), q * (i % columns - j % columns)
                        far, weights = far + weight * math.hypot(down, right), weights + weight
                    means.append(far / weights)
            assert found[layer, head].item() == pytest.approx(sum(means) / len(means), rel=1e-12)


def test_distance_knows_who_looks_where():
    itself = torch.eye(5).expand(1, 1, 5, 5)
    neighbour = torch.eye(5)[:, [0, 2, 1, 4, 3]].expand(1, 1, 5, 5)
    prefix_alone = torch.zeros(1, 1, 5, 5)
    prefix_alone[..., 0] = 1.0
    found = analysis.attention_distance([itself, neighbour, prefix_alone], (2, 2), 16)
    assert found.flatten().tolist() == [0.0, 16.0, 0.0]


def test_distance_of_a_model_is_that_of_its_maps():
    model, x = fastvit.accelerate(small_timm(reg_tokens=1)), images()
    maps = fastvit.attention_maps(model, x, queries="all")
    found = analysis.attention_distance(model, x=x)
    torch.testing.assert_close(found, analysis.attention_distance(maps, (4, 4), 8))
    torch.testing.assert_close(analysis.attention_distance(model, patch_size=16, x=x), 2 * found)
    assert found.shape == (3, 3)


def looped_similarity(table, rows, columns):
    found = np.empty((rows, columns, rows, columns))
    for i in np.ndindex(rows, columns):
        for j in np.ndindex(rows, columns):
            a, b = (table[place[0] * columns + place[1]] for place in (i, j))
            found[(*i, *j)] = np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b))
    return found


def test_similarity_is_the_cosine_of_each_pair():
    table = torch.randn(2 + 6, 5, dtype=torch.float64)
    wanted = looped_similarity(table[2:].numpy(), 2, 3)
    for given in (table, table[None], table[2:]):
        found = analysis.pos_embed_similarity(given, (2, 3))
        assert found.shape == (2, 3, 2, 3)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def clip():
    config = transformers.CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64
    )
    return randomize(transformers.CLIPVisionModel(config))


def vit_24_by_40():
    config = transformers.ViTConfig(
        image_size=(24, 40), patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=3
    )
    return randomize(transformers.ViTModel(config))


def torchvision_model():
    return randomize(torchvision.models.vision_transformer.VisionTransformer(32, 8, 1, 3, 48, 64))


# model, its rows of positions of patches, its patches' projection, grid
MODELS = {
    "timm": (small_timm, lambda m: m.pos_embed[0, 1:], lambda m: m.patch_embed.proj.weight, (4, 4)),
    "registers": (
        lambda: small_timm(reg_tokens=2, no_embed_class=True),
        lambda m: m.pos_embed[0],
        lambda m: m.patch_embed.proj.weight,
        (4, 4),
    ),
    "fastvit": (
        lambda: randomize(
            fastvit.VisionTransformer(img_size=(16, 24), patch_size=8, embed_dim=48, depth=1, num_heads=3)
        ),
        lambda m: m.pos_embed[0, 1:],
        lambda m: m.patch_embed.proj.weight,
        (2, 3),
    ),
    "transformers": (
        vit_24_by_40,
        lambda m: m.embeddings.position_embeddings[0, 1:],
        lambda m: m.embeddings.patch_embeddings.projection.weight,
        (3, 5),
    ),
    "clip": (
        clip,
        lambda m: m.get_submodule("embeddings").position_embedding.weight[1:],
        lambda m: m.get_submodule("embeddings").patch_embedding.weight,
        (4, 4),
    ),
    "torchvision": (torchvision_model, lambda m: m.encoder.pos_embedding[0, 1:], lambda m: m.conv_proj.weight, (4, 4)),
}


@pytest.mark.parametrize("library", MODELS)
def test_tables_and_filters_of_every_library(library):
    make, positions, projection, grid = MODELS[library]
    model = make()
    similarity = analysis.pos_embed_similarity(model)
    wanted = looped_similarity(positions(model).detach().double().numpy(), *grid)
    np.testing.assert_allclose(similarity.numpy(), wanted, atol=1e-5)
    filters = analysis.embedding_filters(model, 5)
    check_filters(filters, projection(model).detach().double().numpy())
    assert analysis.patch_grid(model, torch.zeros(1, 3, 8 * grid[0], 8 * grid[1])) == grid


def check_filters(found, weight):
    """Each picture is, but for shift and stretch, the eigenvector of the filters' covariance of that rank."""
    n, points = len(found), weight.reshape(weight.shape[0], -1)
    centred = points - points.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    assert found.dtype == torch.float32
    assert found.shape == (n, *weight.shape[1:])
    for rank in range(n):
        vector = vectors[:, np.argsort(values)[::-1][rank]]
        vector = vector * np.sign(vector[np.argmax(np.abs(vector))])
        picture = (vector - vector.min()) / (vector.max() - vector.min())
        np.testing.assert_allclose(found[rank].flatten().numpy(), picture, atol=1e-5)


def test_filters_take_any_order_of_their_sources_rows():
    model = small_timm()
    before = analysis.embedding_filters(model, 4)
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.flip(0))
    torch.testing.assert_close(analysis.embedding_filters(model, 4), before, atol=1e-5, rtol=0)
    assert analysis.embedding_filters(model).shape == (28, 3, 8, 8)


def test_patch_maps_leave_the_prefix_out():
    maps = torch.arange(2 * 8.0).view(2, 1, 8)
    pictures = analysis.patch_maps(maps, (2, 3))
    assert pictures.shape == (2, 1, 2, 3)
    assert pictures[1, 0].tolist() == [[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: analysis.attention_rollout(some_maps()[0]),
            TypeError,
            "expected maps of layers or a model, got Tensor",
        ),
        (lambda: analysis.attention_rollout([]), TypeError, "expected maps of layers or a model, got list"),
        (lambda: analysis.attention_rollout(small_timm()), TypeError, "attention_rollout: a model needs x"),
        (lambda: analysis.attention_rollout([m[:, :, :1] for m in some_maps()]), ValueError, r"got \(2, 2, 1, 7\)"),
        (lambda: analysis.attention_rollout(["map"]), ValueError, "as attention_maps.* gives, got str"),
        (lambda: analysis.attention_distance(some_maps()), TypeError, "maps need grid"),
        (lambda: analysis.attention_distance(some_maps(), (3, 3), 8), ValueError, "of at most 7 patches, got"),
        (lambda: analysis.attention_distance(small_timm(), (4, 4), 8), TypeError, "a model needs x"),
        (lambda: analysis.attention_distance(small_timm(), torch.ones(1, 3, 8, 8)), TypeError, "a model needs x="),
        (lambda: analysis.attention_distance(some_maps(), (2, 3), "8"), ValueError, "patch_size must be pixels"),
        (lambda: analysis.attention_distance(some_maps(), (2, 3), (8, -8)), ValueError, r"got \(8, -8\)"),
        (lambda: analysis.attention_rollout([torch.ones(1, 1, n, n) for n in (4, 5)]), ValueError, "the same B and N"),
        (lambda: analysis.pos_embed_similarity("table"), TypeError, "expected a model or a table, got str"),
        (lambda: analysis.pos_embed_similarity(torch.ones(4, 2)), ValueError, "comes with grid="),
        (lambda: analysis.pos_embed_similarity(small_timm(pos_embed="none")), ValueError, "no table of positions"),
        (lambda: analysis.embedding_filters(small_timm(), 49), ValueError, r"n must be in 1\.\.48, got 49"),
        (lambda: analysis.embedding_filters(torch.nn.Linear(2, 2)), ValueError, "no embedding of images, or several"),
        (lambda: analysis.embedding_filters("vit"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: analysis.patch_maps(torch.ones(4), (2, 2, 1)), ValueError, "grid must be"),
        (
            lambda: analysis.patch_grid(small_timm(), torch.ones(3, 8, 8)),
            ValueError,
            r"x must be images .*got \(3, 8, 8\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_hybrids_stem_has_no_filters_of_pixels():
    backbone = timm.create_model("resnet10t", features_only=True, out_indices=[2])
    model = small_timm(img_size=64, patch_size=2, embed_layer=lambda **k: timm.layers.HybridEmbed(backbone, **k))
    assert analysis.patch_grid(model, torch.zeros(1, 3, 64, 64)) == model.patch_embed.grid_size
    assert fastvit.attention_maps(model, images(side=64), 0, [(1, 1)])[0].shape[2] == 1
    with pytest.raises(ValueError, match="does not project patches of pixels"):
        analysis.embedding_filters(model)
