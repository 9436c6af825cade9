"""What a recording holds: each op that was called, its FLOPs and the bytes it must move, by formulas written here."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from fastvit import backends, ops
from fastvit.benchmarks import call_work, recording, work

needs_kernels = pytest.mark.skipif(not backends.is_available("cpu"), reason="the extension is not built")


def calls(run: Any) -> list[tuple[str, int | None, int]]:
    """(op, FLOPs, bytes) of all that a function calls."""
    with torch.no_grad():
        seen = recording.record(run).calls
    return [(call.name, call_work.flops_of(call), call_work.bytes_of(call)) for call in seen]


x, y, w, b = torch.randn(6, 8), torch.randn(6, 8), torch.randn(5, 8), torch.randn(5)
row, image, patches = torch.randn(8), torch.randn(2, 3, 8, 8), torch.randn(7, 3, 4, 4)
q, k, v = torch.randn(3, 2, 3, 10, 16)
ATTENTION = 4 * 2 * 3 * 10 * 10 * 16  # two products for each of 2 images and 3 heads

# what is run, and of each op its FLOPs and the numbers that must move, all of them fp32
KNOWN: dict[str, tuple[Any, list[tuple[str, int, int]]]] = {
    "linear": (lambda: F.linear(x, w, b), [("aten::addmm", 2 * 6 * 8 * 5, 5 + 48 + 40 + 30)]),
    "mm": (lambda: x @ w.t(), [("aten::mm", 2 * 6 * 8 * 5, 48 + 40 + 30)]),
    "layer_norm": (lambda: F.layer_norm(x, (8,), row, row), [("aten::native_layer_norm", 0, 48 + 8 + 48 + 2 * 6)]),
    "add": (lambda: x + y, [("aten::add", 0, 3 * 48)]),
    "add to itself": (lambda: x + x, [("aten::add", 0, 2 * 48)]),
    "add a row to all": (lambda: x + row.expand(6, 8), [("aten::add", 0, 48 + 8 + 48)]),
    "add in place": (lambda: x.clone().add_(y), [("aten::clone", 0, 2 * 48), ("aten::add_", 0, 3 * 48)]),
    "add into": (lambda: torch.add(x, y, out=torch.empty(6, 8)), [("aten::add", 0, 3 * 48)]),
    "copy": (lambda: torch.empty(6, 8).copy_(x), [("aten::copy_", 0, 2 * 48)]),
    "zeros": (lambda: torch.zeros(6, 8), [("aten::zeros", 0, 48)]),
    "cat": (lambda: torch.cat([x, y]), [("aten::cat", 0, 4 * 48)]),
    "halves": (lambda: x.half(), [("aten::_to_copy", 0, 48 + 24)]),
    "nothing": (lambda: F.dropout(x.view(2, 24).t()[None].expand(3, -1, -1), 0.5, False).unbind(0), []),
    "memory": (lambda: torch.empty_like(x), []),
    "convolution": (
        lambda: F.conv2d(image, patches, stride=4),
        [("aten::convolution", 2 * 2 * 4 * 48 * 7, 2 * 192 + 7 * 48 + 2 * 7 * 4)],
    ),
    "attention": (
        lambda: F.scaled_dot_product_attention(q, k, v),
        [("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION, 4 * q.numel() + 2 * 3 * 10)],
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_work_of_torchs_ops(name: str) -> None:
    run, expected = KNOWN[name]
    assert calls(run) == [(op, flops, 4 * numbers) for op, flops, numbers in expected]


def test_an_attention_made_of_others_is_its_products() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        seen = calls(lambda: F.scaled_dot_product_attention(q, q, q))
    products = [flops for name, flops, _ in seen if name == "aten::bmm"]
    assert products == [ATTENTION // 2, ATTENTION // 2]
    assert all(flops == 0 for name, flops, _ in seen if name != "aten::bmm")


def test_inference_mode_is_seen_as_any_other() -> None:
    def run() -> None:
        with torch.inference_mode():
            F.dropout(F.linear(x, w, b), 0.5, training=False)

    assert [name for name, _, _ in calls(run)] == ["aten::addmm"]


def test_gradients_of_a_convolution_that_needs_none_of_its_images() -> None:
    weight = patches.clone().requires_grad_()
    seen = recording.record(lambda: F.conv2d(image, weight, stride=4).sum().backward())
    flops = {call.name: call_work.flops_of(call) for call in seen.calls}
    assert flops["aten::convolution_backward"] == flops["aten::convolution"] == 2 * 2 * 4 * 48 * 7


B, N, H, E, D, HIDDEN = 2, 9, 3, 32, 96, 192


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


# the op, arguments' shapes, FLOPs forward and backward, the numbers that `work` says must move forward
OURS: dict[str, tuple[Any, tuple, tuple[int, int], int]] = {
    "layer_norm": (ops.layer_norm, ((B, N, D), (D,), (D,)), (0, 0), work.layer_norm(B * N, D, keep=True).bytes(4)),
    "group_norm": (
        lambda x, w, b: ops.group_norm(x, 32, w, b, relu=True),
        ((B, D, 7, 9), (D,), (D,)),
        (0, 0),
        work.group_norm(B, D, 63, 32, keep=True).bytes(4),
    ),
    "linear": (
        lambda x, w, b, r: ops.linear(x, w, b, activation="gelu", residual=r),
        ((B, N, D), (HIDDEN, D), (HIDDEN,), (B, N, HIDDEN)),
        (2 * B * N * D * HIDDEN, 4 * B * N * D * HIDDEN),
        work.linear(B * N, D, HIDDEN, activation=True, residual=True, keep=True).bytes(4),
    ),
    "attention": (
        lambda qkv: ops.attention_packed(qkv, H),
        ((B, N, 3 * D),),
        (4 * B * N * N * D, 10 * B * N * N * D),
        work.attention(B, H, N, N, E, keep=True).bytes(4),
    ),
    "norm_mlp": (
        ops.norm_mlp,
        ((B, N, D), (D,), (D,), (HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,)),
        (4 * B * N * D * HIDDEN, 8 * B * N * D * HIDDEN),
        work.norm_mlp(B * N, D, HIDDEN, keep=True).bytes(4),
    ),
    "patch_embed": (
        ops.patch_embed,
        ((B, 3, 8, 12), (D, 3, 4, 4), (D,), (7, D), (1, D)),
        (2 * B * 6 * 48 * D, 2 * B * 6 * 48 * D),
        work.patch_embed(B, 6, 48, D, 1).bytes(4),
    ),
}


@needs_kernels
@pytest.mark.parametrize("op", OURS)
def test_the_work_of_our_ops(op: str) -> None:
    call, shapes, (forward, backward), least = OURS[op]
    given = tensors(*shapes)
    with fastvit.backend("cpu"):
        seen = recording.record(lambda: call(*given).sum().backward()).calls
    found = {one.name: one for one in seen}
    assert call_work.flops_of(found[f"fastvit::{op}"]) == forward
    assert call_work.flops_of(found[f"fastvit::{op}_backward"]) == backward
    assert call_work.bytes_of(found[f"fastvit::{op}"]) == pytest.approx(least, rel=0.01)
    assert not any(name.startswith("fastvit_native::") for name in found), "what an op calls is part of it"


def block_parameters() -> list[torch.Tensor | None]:
    shapes = ((D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), None)
    shapes += ((D,), (D,), (HIDDEN, D), (HIDDEN,), (D, HIDDEN), (D,), None)
    return [None if shape is None else torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


@needs_kernels
def test_the_work_of_whole_blocks() -> None:
    blocks = [ops.EncoderBlock(*block_parameters()) for _ in range(3)]
    tokens = torch.randn(B, N, D)
    flops = 2 * B * N * (4 * D * D + 2 * D * HIDDEN) + 4 * B * N * N * D
    with fastvit.backend("cpu"), torch.no_grad():
        ops.encoder(tokens, blocks, H)
        seen = {call.name: call for call in recording.record(lambda: ops.encoder(tokens, blocks, H)).calls}
    assert call_work.flops_of(seen["fastvit_native::encoder"]) == 3 * flops
    numbers = sum(p.numel() for block in blocks for p in block[:14] if p is not None) + 2 * tokens.numel()
    assert call_work.bytes_of(seen["fastvit_native::encoder"]) == pytest.approx(4 * numbers, rel=0.02)
    assert call_work.bytes_of(seen["fastvit_native::fingerprint"]) == 0
    with fastvit.backend("cpu"):
        step = recording.record(lambda: ops.encoder(tokens, blocks[:1], H).sum().backward())
    seen = {call.name: call for call in step.calls}
    assert call_work.flops_of(seen["fastvit::block"]) == flops
    assert call_work.flops_of(seen["fastvit::block_backward"]) == 2 * flops + 2 * B * N * N * D


def node(number: int, parent: int, name: str, schema: str = "", *scalars: float) -> dict[str, Any]:
    """A node of an execution trace; an op's first argument and its result are one tensor of 6 numbers."""
    tensor = {"values": [[5, 5, 0, 6, 4, "cpu"]], "shapes": [[2, 3]], "types": ["Tensor(float)"], "strides": [[3, 1]]}
    more = {"values": [*scalars], "shapes": [[]], "types": ["Double"], "strides": [[]]} if scalars else {}
    inputs: dict[str, list] = {key: [*its, *more.get(key, [])] if schema else [] for key, its in tensor.items()}
    outputs = tensor if schema else inputs
    attributes = [{"name": "op_schema", "value": schema}]
    return {"id": number, "ctrl_deps": parent, "name": name, "inputs": inputs, "outputs": outputs, "attrs": attributes}


def test_ops_of_a_kernels_own_threads_are_left_out_and_those_of_autograds_are_not() -> None:
    thread = "[pytorch|profiler|execution_trace|thread]"
    zero = ("aten::zero_", "aten::zero_(Tensor(a!) self) -> Tensor(a!)")
    fill = ("aten::fill_", "aten::fill_.Scalar(Tensor(a!) self, Scalar value) -> Tensor(a!)", 1.0)
    backward = "autograd::engine::evaluate_function: X"
    nodes = [node(9, 8, *fill), node(7, 6, *fill), node(3, 2, *zero), node(4, 3, *fill), node(8, 5, backward)]
    found = recording.read([*nodes, *(node(number, 1, thread) for number in (2, 5, 6))])
    assert [(name, call is not None) for name, call in found.steps] == [
        ("aten::zero_", True),
        ("aten::fill_", False),  # inside the other
        ("aten::fill_", True),
    ]
    assert [call_work.bytes_of(call) for call in found.calls] == [24, 24]
