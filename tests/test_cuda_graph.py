"""fastvit.graph: what is captured when, by a capture that runs on the CPU; and CUDA graphs themselves on a GPU."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import fastvit
from fastvit import cuda_graph as graphs

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit():
    return fastvit.VisionTransformer(**SIZES).eval()


@pytest.fixture
def captures(monkeypatch):
    """Captures on the CPU: a replay computes from the static input and writes over the static result."""
    taken = []

    def capture(forward, static, pool):
        result = forward(static)
        taken.append(tuple(static.shape))

        def replay():
            tensors = result if isinstance(result, (tuple, list)) else [result]
            fresh = forward(static)
            for old, new in zip(tensors, fresh if isinstance(fresh, (tuple, list)) else [fresh], strict=True):
                old.copy_(new)

        return result, replay

    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(graphs, "_pool", lambda: None)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    return taken


def images(batch):
    return torch.randn(batch, 3, 32, 32)


def test_a_shape_is_captured_once(captures):
    model = vit()
    run = fastvit.graph(model, images(1))
    for batch in (1, 2, 1, 2, 1):
        x = images(batch)
        assert torch.equal(run(x), model(x))
    assert captures == [(1, 3, 32, 32), (2, 3, 32, 32)]
    assert run.shapes() == [(2, 3, 32, 32), (1, 3, 32, 32)]


def test_a_result_is_the_callers_own(captures):
    run = fastvit.graph(vit(), images(1))
    first = run(images(1))
    kept = first.clone()
    run(images(1))
    assert torch.equal(first, kept)
    assert not first.requires_grad


def test_new_numbers_are_seen_and_moved_parameters_are_captured_anew(captures):
    model, x = vit(), images(1)
    run = fastvit.graph(model, x)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(run(x), model(x))
    assert len(captures) == 1
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))
    assert torch.equal(run(x), model(x))
    assert len(captures) == 2
    assert len(run.shapes()) == 1, "what was captured of freed memory must go"


def test_autocast_is_another_graph(captures):
    model, x = vit(), images(1)
    run = fastvit.graph(model, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(x), model(x))
    assert len(captures) == 2


def test_the_oldest_shape_goes_first(captures):
    run = fastvit.graph(vit(), images(1), max_shapes=2)
    for batch in (2, 1, 3):
        run(images(batch))
    assert [shape[0] for shape in run.shapes()] == [1, 3]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, x + 1),
        lambda x: [x],
        lambda x: namedtuple("Pair", "a b")(x, x * 2),
        lambda x: OrderedDict(logits=x),
        lambda x: {"logits": x, "kept": None},
    ],
)
def test_results_of_every_kind_are_copied(wrap):
    result = wrap(torch.ones(2))
    copied = graphs._copied(result)
    assert type(copied) is type(result)
    old, new = (list(r.values()) if isinstance(r, dict) else list(r) for r in (result, copied))
    for a, b in zip(old, new, strict=True):
        assert (a is None and b is None) or (torch.equal(a, b) and a.data_ptr() != b.data_ptr())


def test_bad_calls(captures):
    with pytest.raises(ValueError, match=r"max_shapes must be a positive integer, got 0"):
        fastvit.graph(vit(), images(1), max_shapes=0)
    with pytest.raises(RuntimeError, match="training mode"):
        fastvit.graph(vit().train(), images(1))
    with pytest.raises(ValueError, match="example must be a CUDA tensor, got ndarray"):
        fastvit.graph(vit(), images(1).numpy())


def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="example must be a CUDA tensor, got one on cpu"):
        fastvit.graph(vit(), images(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU: this machine has none")
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_replays_equal_the_model(backend):
    model = vit().to("cuda", torch.bfloat16)
    with fastvit.backend(backend):
        run = fastvit.graph(model, images(2).to("cuda", torch.bfloat16))
        for batch in (2, 1, 2):
            x = images(batch).to("cuda", torch.bfloat16)
            with torch.no_grad():
                assert torch.equal(run(x), model(x))
