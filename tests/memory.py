"""Every CPU kernel on small tensors of odd sizes, for a tool to watch: `make sanitize` and `make memcheck`.

    python tests/memory.py

Whatever instruction sets this machine has, with one thread and with two. Inputs end where their memory ends, so that
the tool sees who reads on, or lie in NaN; results are compared with plain PyTorch's in fp64.
"""

import os
from collections.abc import Iterable
from functools import partial

import torch
from arena import arena
from calls import CALLS, Shapes
from torch import Tensor, nn

import fastvit
from fastvit import native, ops
from fastvit.ops.encoder import TENSORS, run_encoder

# Relative L2 error of the outputs, which are sums of a few hundred products; of their gradients twice that.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.002}
# The sizes of tests/calls.py -> sizes that fill no tile, panel or vector: N, E, D = 2 E, F, 3 D.
SIZES = {5: 21, 8: 35, 16: 70, 24: 83, 48: 210}
PATCHES: Shapes = {
    "image": (3, 3, 10, 21),
    "weight": (70, 3, 5, 7),
    "bias": (70,),
    "pos_embed": (1, 8, 70),
    "prefix": (1, 2, 70),
}
NAMES = ops.EncoderBlock._fields[:TENSORS]
DATA = ("x", "residual", "q", "k", "v", "qkv", "image")  # what has the batch, or the tokens of all images, in front


def shapes(op: str) -> Shapes:
    if op == "patch_embed":
        return PATCHES
    return {name: tuple(SIZES.get(n, n) for n in shape) for name, shape in CALLS[op][1].items()}


def made(op: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors at random, weights such that their products are of order one."""
    random = {name: torch.randn(shape) for name, shape in shapes(op).items()}
    return {name: (t / t[0].numel() ** 0.5 if is_matrix(name, t) else t).to(dtype) for name, t in random.items()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith("weight") and tensor.dim() > 1


def close(what: str, got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape, what
    error, size = (got.double() - want).norm().item(), want.norm().item()
    assert error <= bound * size, f"{what}: relative error {error / size:.1e}, at most {bound:.0e} expected"


def differentiate(op: str, tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
    """The output and the gradient of every tensor."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with fastvit.backend(backend):
        output = CALLS[op][0](**leaves)
    incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad(output, list(leaves.values()), incoming)]


def check_op(op: str, dtype: torch.dtype) -> None:
    tensors = made(op, dtype)
    want = differentiate(op, {name: tensor.double() for name, tensor in tensors.items()}, "reference")
    for kind, lay in {"whole": Tensor.clone, "in NaN": partial(arena, device="cpu")}.items():
        got = differentiate(op, {name: lay(tensor) for name, tensor in tensors.items()}, "cpu")
        for what, g, w in zip(["output", *tensors], got, want, strict=True):
            close(f"{op} {dtype} {kind}: {what}", g, w, BOUNDS[dtype] * (1 if what == "output" else 2))
    with torch.no_grad(), fastvit.backend("cpu"):
        weights = {name: nn.Parameter(tensor) for name, tensor in tensors.items() if name not in DATA}
        data = {name: tensor for name, tensor in tensors.items() if name in DATA}
        for _ in range(3):  # a parameter seen twice is packed and kept
            close(f"{op} {dtype} packed", CALLS[op][0](**data, **weights), want[0], BOUNDS[dtype])
        empty = {name: tensor[:0] if name in data else tensor for name, tensor in tensors.items()}
        if op != "attention_varlen":
            assert CALLS[op][0](**empty).numel() == 0


def check_autocast() -> None:
    """A training block whose products are bfloat16 and whose tokens and parameters are float32."""
    tensors = made("encoder", torch.float32)
    want = differentiate("encoder", {name: tensor.double() for name, tensor in tensors.items()}, "reference")
    for lay in (Tensor.clone, partial(arena, device="cpu")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = differentiate("encoder", {name: lay(tensor) for name, tensor in tensors.items()}, "cpu")
        for what, g, w in zip(["output", *tensors], got, want, strict=True):
            close(f"encoder under autocast: {what}", g, w, BOUNDS[torch.bfloat16] * (1 if what == "output" else 2))


def check_masks(dtype: torch.dtype) -> None:
    heads = [torch.randn(2, 2, n, 19).to(dtype) for n in (21, 35, 35)]
    shown = (torch.rand(2, 1, 21, 35) > 0.4).index_fill(3, torch.tensor(0), True)
    for mask in (None, shown, torch.randn(21, 35).to(dtype), torch.randn(1, 2, 21, 35)):
        exact = mask.double() if mask is not None and mask.is_floating_point() else mask
        for causal in (False, True):
            with fastvit.backend("reference"):
                want = ops.attention(*(t.double() for t in heads), mask=exact, causal=causal)
            with fastvit.backend("cpu"):
                got = ops.attention(*heads, mask=mask, causal=causal)
            close(f"attention {dtype} {None if mask is None else mask.dtype} {causal}", got, want, 2 * BOUNDS[dtype])
    heads[2][:, :, 20] = torch.inf  # summed key by key
    with fastvit.backend("cpu"):
        assert ops.attention(*heads, causal=True)[:, :, :20].isfinite().all()


def check_products(dtype: torch.dtype) -> None:
    x, weight = torch.randn(33, 19).to(dtype), torch.randn(45, 19).to(dtype)
    for activation in ("gelu_tanh", "quick_gelu"):
        with fastvit.backend("reference"):
            want = ops.linear(x.double(), weight.double(), activation=activation)
        with fastvit.backend("cpu"):
            close(f"linear {dtype} {activation}", ops.linear(x, weight, activation=activation), want, BOUNDS[dtype])
    want = x.double() @ weight.double().T
    for a in (x, x.T.contiguous().T):
        for b in (weight.T, weight.T.contiguous()):
            close(f"matmul {dtype}", native.matmul(a, b), want, BOUNDS[dtype])


def check_bytes(dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, PATCHES["image"], dtype=torch.uint8)
    tensors = {name: tensor for name, tensor in made("patch_embed", dtype).items() if name != "image"}
    for image in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        options = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
        with fastvit.backend("reference"):
            want = ops.patch_embed(image, **{name: tensor.double() for name, tensor in tensors.items()}, **options)
        with fastvit.backend("cpu"):
            close(f"patch_embed {dtype} of bytes", ops.patch_embed(image, **tensors, **options), want, BOUNDS[dtype])


def check_encoder() -> None:
    """An odd width and an odd head, so that no unit of two or four elements is full; layers of int8 among others."""
    tokens, width, heads = 21, 45, 3
    sizes = {16: width, 24: 67, 48: 3 * width}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, blocks = torch.randn(3, tokens, width).to(dtype), []
        for _ in range(2):
            random = {name: torch.randn([sizes[n] for n in CALLS["encoder"][1][name]]) for name in NAMES}
            scaled = {name: t * (t.shape[-1] ** -0.5 if t.dim() > 1 else 0.3) for name, t in random.items()}
            blocks.append(ops.EncoderBlock(**{name: nn.Parameter(t.to(dtype)) for name, t in scaled.items()}))
        exact = [ops.EncoderBlock(*(t.double() if isinstance(t, Tensor) else t for t in block)) for block in blocks]
        with torch.no_grad(), fastvit.backend("reference"):
            want = ops.encoder(x.double(), exact, heads)
        parameters, eps = [t for block in blocks for t in block[: len(NAMES)]], [1e-6] * 4
        with torch.no_grad(), fastvit.backend("cpu"):
            close(f"encoder {dtype}", ops.encoder(x, blocks, heads), want, BOUNDS[dtype])
            assert ops.encoder(x[:0], blocks, heads).numel() == 0
            for int8 in ([True] * 8, [True, False, False, True] * 2, [False, True, True, False] * 2):
                got = run_encoder(x, parameters, eps, heads, (width // heads) ** -0.5, "gelu", int8)
                close(f"encoder {dtype} {int8}", got, want, 0.05)


def check_model() -> None:
    """A whole model, as it is and quantised."""
    config = fastvit.ViTConfig(img_size=24, patch_size=8, embed_dim=36, depth=2, num_heads=2, num_classes=7)
    model = fastvit.VisionTransformer(config).eval()
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad(), fastvit.backend("reference"):
        want = model(images).double()
    with torch.no_grad(), fastvit.backend("auto"):
        close("model", model(images), want, 1e-5)
        assert all(layer.int8 for layer in fastvit.quantize(model, images, threshold=torch.inf))
        close("quantised model", model(images), want, 0.1)


def check_all(dtypes: Iterable[torch.dtype] = tuple(BOUNDS)) -> None:
    for dtype in dtypes:
        for op in CALLS:
            check_op(op, dtype)
        check_masks(dtype)
        check_products(dtype)
        check_bytes(dtype)
    check_encoder()
    check_autocast()
    check_model()


def main() -> None:
    print("fastvit from", os.path.dirname(fastvit.__file__), flush=True)
    info = native.build_info()
    for isa in info["cpu_compiled"][: info["cpu_compiled"].index(info["cpu_detected"]) + 1]:
        torch.ops.fastvit_native.cpu_isa(isa)
        for threads, dtypes in (1, BOUNDS), (2, (torch.float32, torch.bfloat16)):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            check_all(dtypes)
            print(f"{isa}, threads: {threads}", flush=True)


if __name__ == "__main__":
    main()
