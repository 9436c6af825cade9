"""The norm_mlp launcher: what it reads, writes, keeps and holds on to, on each of its ways."""

import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F
from arena import DEVICE, arena, double, each_dtype, random, run
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastvit import ops
from fastvit.backends import backend
from fastvit.kernels import _device, _norm_mlp, _tuning, norm_mlp

WAYS = {
    "one kernel": {"FUSED_MLP_WAVES": 0, "FUSED_MLP_WIDTH": 384},
    "folded": {"FUSED_MLP_WIDTH": 0, "FOLD_SHARE": 1e9},
    "loaded": {"FUSED_MLP_WIDTH": 0, "FOLD_SHARE": 0},
}


@pytest.fixture
def way(request, monkeypatch):
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(_tuning, name, value)
    if _device.INTERPRETING:  # there an unrolled loop takes the time of all its rounds
        monkeypatch.setattr(_tuning, "WEIGHT_SUM", dataclasses.replace(_tuning.WEIGHT_SUM, UNROLL=1))
    return request.param


each_way = pytest.mark.parametrize("way", WAYS, indirect=True)


def mathematics(x, norm_weight, norm_bias, up, up_bias, down, down_bias, scale, factors):
    preact = F.linear(F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, 1e-6), up, up_bias)
    branch = F.linear(F.gelu(preact), down, down_bias)
    return preact, x + factors.repeat_interleave(len(x) // len(factors))[:, None] * scale * branch


def sample(rows, width, hidden, dtype):
    return (
        random(rows, width, dtype=dtype),
        *(random(width, dtype=dtype) for _ in range(2)),
        random(hidden, width, dtype=dtype, scale=width**-0.5),
        random(hidden, dtype=dtype),
        random(width, hidden, dtype=dtype, scale=hidden**-0.5),
        *(random(width, dtype=dtype) for _ in range(2)),
    )


@pytest.mark.grid(6)
@pytest.mark.parametrize(("rows", "width", "hidden"), [(66, 72, 131), (135, 192, 128)])
@each_dtype
@each_way
def test_norm_mlp(way, dtype, rows, width, hidden):
    tensors = sample(rows, width, hidden, dtype)
    tensors[0][1] = 0.5  # a row without variance
    factors = arena(torch.tensor([0.0, 2.0, 2.0]).to(dtype))
    exact, eager = mathematics(*double(*tensors, factors)), mathematics(*tensors, factors)
    y, mean, rstd, preact = run(norm_mlp, *tensors, 1e-6, "gelu", True, True, factors)
    assert_close("preact", preact, exact[0], eager[0])
    assert_close("y", y, exact[1], eager[1])
    x = tensors[0].double()
    torch.testing.assert_close(mean.double(), x.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (x.var(1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
    again, *nothing = run(norm_mlp, *tensors, 1e-6, "gelu", True, False, factors)
    assert torch.equal(again, y)
    assert not any(t.numel() for t in nothing)


@pytest.mark.grid(6)
@pytest.mark.parametrize(("rows", "width", "hidden"), [(66, 72, 131), (135, 192, 128)])
@each_dtype
@each_way
def test_backward(way, dtype, rows, width, hidden):
    tensors = sample(rows, width, hidden, dtype)
    factors = arena(torch.tensor([0.0, 2.0, 2.0]).to(dtype))
    dy = random(rows, width, dtype=dtype)

    def gradients(*leaves):
        *leaves, scales = (leaf.detach().requires_grad_() for leaf in leaves)
        return torch.autograd.grad(mathematics(*leaves, scales)[1], leaves, dy.to(scales.dtype))

    _, mean, rstd, preact = norm_mlp.forward(*tensors, 1e-6, "gelu", True, True, factors)
    given = (dy, *tensors[:4], *tensors[5:], arena(mean), arena(rstd), preact)
    got = run(norm_mlp, *given, "gelu", True, factors, entry="backward")
    exact, eager = gradients(*double(*tensors, factors)), gradients(*tensors, factors)
    for number, gradient in enumerate(got):
        assert_close(f"gradient {number}", gradient, exact[number], eager[number], gradient=True)


def test_which_way(monkeypatch):
    """One kernel takes 16-bit rows that its pieces hold exactly, enough of them, and addresses that 32 bits hold."""

    def tile(rows=20000, width=192, hidden=768, dtype=torch.bfloat16, out=None, stride=None):
        x, up, down = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((rows, stride or width), (hidden, width), (out or width, hidden))
        )
        return _norm_mlp.tile_for(x[:, :width], up, down)

    assert (tile().BLOCK_D, tile().LAST_D, tile().PIECES) == (128, 64, 2)
    assert (tile(width=64).BLOCK_D, tile(width=64).LAST_D, tile(width=64).PIECES) == (64, 64, 1)
    for refused in (
        {"rows": 1000},
        {"rows": 0},
        {"width": 200},
        {"width": 384},
        {"hidden": 770},
        {"hidden": 776},
        {"dtype": torch.float32},
        {"out": 64},
        {"stride": 193},
        {"stride": 1 << 23},
    ):
        assert tile(**refused) is None, refused
    monkeypatch.setattr(_tuning, "FUSED_MLP_WIDTH", 384)
    assert (tile(width=384).BLOCK_D, tile(width=384).LAST_D, tile(width=384).PIECES) == (128, 128, 3)
    assert _tuning.folds(256 * 197, 3072, 768)
    assert not _tuning.folds(197, 3072, 768)


@each_way
def test_far_rows(way):
    far = 1 << 31
    # Two pages of it are touched, so the rest costs address space and no memory.
    buffer = torch.empty(far + 64, dtype=torch.bfloat16, device=DEVICE)
    rows = buffer.as_strided((2, 64), (far, 1)).copy_(torch.randn(2, 64))
    _, *parameters = sample(2, 64, 64, torch.bfloat16)
    near, far = (norm_mlp.forward(x, *parameters, 1e-6, "gelu", True, True, None) for x in (rows.contiguous(), rows))
    if way != "one kernel":  # it leaves far rows to the others, which round otherwise
        assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))
    torch.testing.assert_close(near, far, rtol=1e-2, atol=1e-2)


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of all that was allocated inside."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, count):
        self.now += count
        self.most = max(self.most, self.now)

    def of(self, call, *given):
        self.seen.update(tensor.untyped_storage() for tensor in given)
        with self:
            call()
        return self.most


@pytest.mark.parametrize("way", ["one kernel", "folded"], indirect=True)
def test_training_holds_little(way):
    """Forward and backward of the MLP half of a block hold at most three quarters of what eager does."""
    tensors = [t.contiguous().requires_grad_() for t in sample(512, 64, 256, torch.bfloat16)]
    *parameters, scale = tensors
    names = ("x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    dy = torch.randn(512, 64, device=DEVICE).bfloat16()

    def eager(x, norm_weight, norm_bias, up, up_bias, down, down_bias):
        hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, 1e-6), up, up_bias))
        return x + scale * F.linear(hidden, down, down_bias)

    def fused():
        return ops.norm_mlp(**dict(zip(names, parameters, strict=True)), layer_scale=scale)

    def peak(call):
        return Peak().of(lambda: torch.autograd.grad(call(), tensors, dy), *tensors, dy)

    with backend("triton"):
        fused_bytes = peak(fused)
    eager_bytes = peak(lambda: eager(*parameters))
    assert eager_bytes >= 12 * dy.nbytes  # normalised rows, fc1's result and its activation, and a gradient as large
    assert fused_bytes <= 0.75 * eager_bytes
