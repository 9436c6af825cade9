"""What is measured, as data, and the work each case holds, by closed formulas from the model's configuration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from . import stems

if TYPE_CHECKING:
    from fastvit.config import ViTConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"  # a dtype of whole models only, on a CPU: fastvit.quantize, beside eager in float32
MODEL_DTYPES = (*DTYPES, INT8)
DIRECTIONS = FORWARD, TRAINING = "forward", "training"
TRAINING_DTYPES = ("float32", "bfloat16", "float16")  # of the products, by autocast; the weights are float32
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


@dataclass(frozen=True)
class Case:
    """One forward pass, or one training step: a model's name, the batch B and the name of a dtype.

    img_size: side of the square images in pixels; None takes the model's own.

    Raises:
        ValueError: no such model, a size that is no multiple of its patches, or a dtype that cannot be trained in.
    """

    model: str
    batch: int
    dtype: str
    direction: str = FORWARD
    img_size: int | None = None

    def __post_init__(self) -> None:
        P, Q = pair(self.config.patch_size)
        if self.img_size is not None and (self.img_size % P or self.img_size % Q):
            raise ValueError(f"img-size {self.img_size} is not divisible by the patches of {self.model}, {P} x {Q}")
        if self.direction == TRAINING and self.dtype not in TRAINING_DTYPES:
            raise ValueError(f"direction {TRAINING} takes dtype {', '.join(TRAINING_DTYPES)}, got {self.dtype}")

    @property
    def config(self) -> ViTConfig:
        """The model's configuration, at the size of the images."""
        import fastvit.config

        preset = fastvit.config.preset(self.model)
        return preset if self.img_size is None else replace(preset, img_size=self.img_size)

    @property
    def title(self) -> str:
        """What a reader calls it."""
        unusual = variant(self.model, pair(self.config.img_size), self.direction)
        return " ".join([self.model, f"batch {self.batch}", self.dtype, *unusual])

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of eager's weights and of the images: float32 where autocast or quantisation goes below it."""
        return torch.float32 if self.direction == TRAINING or self.dtype == INT8 else DTYPES[self.dtype]

    @property
    def compute(self) -> torch.dtype:
        """What the matrix products multiply: its rate is the ceiling."""
        return torch.int8 if self.dtype == INT8 else DTYPES[self.dtype]

    @property
    def shape(self) -> str:
        """The input's shape as it stands in a row: "8x3x224x224"."""
        height, width = pair(self.config.img_size)
        return f"{self.batch}x{self.config.in_chans}x{height}x{width}"

    @property
    def flops(self) -> int:
        """Floating-point operations: a training step is a forward pass and two products for each of its products."""
        return flops(self.config, self.batch) * (3 if self.direction == TRAINING else 1)

    @property
    def bytes(self) -> int | None:
        """The least traffic of a forward pass in one dtype; no formula covers the other cases."""
        if self.direction == TRAINING or self.dtype == INT8:
            return None
        return traffic(self.config, self.batch, self.torch_dtype)


@dataclass(frozen=True)
class Grid:
    """Every combination of models, directions, sizes of images, dtypes and batches; no training in int8."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32",)
    directions: tuple[str, ...] = (FORWARD,)
    sizes: tuple[int | None, ...] = (None,)

    def cases(self) -> list[Case]:
        """The combinations, the last axis, batches, running fastest."""
        axes = (self.models, self.directions, self.sizes, self.dtypes, self.batches)
        return [Case(model, batch, dtype, way, size) for model, way, size, dtype, batch in itertools.product(*axes)]


TI, S, B, L = (f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
H = "vit_huge_patch14_224"
LARGE = tuple(f"vit_{size}_patch16_384" for size in ("small", "base", "large"))
HALVES = ("bfloat16", "float16")

GRIDS: dict[str, tuple[Grid, ...]] = {
    "default": (Grid((B,), (1, 8)),),
    "peers": (Grid((S, B), (1, 8), ("float32", "bfloat16", INT8)),),
    "growth": (Grid((TI, S), (1, 4, 16, 64), ("float32", "bfloat16")), Grid((B,), (1,), sizes=(112, 224, 384, 512))),
    "training": (Grid((TI, S, B), (8,), ("float32", "bfloat16"), (TRAINING,)),),
    # The figures that the targets name come first, for a run that is cut short.
    "gpu": (
        Grid((B, S, L), (256,), ("bfloat16",)),
        Grid((B, S, L), (64,), ("bfloat16",), (TRAINING,)),
        Grid((S, B, L), (1,), ("bfloat16",)),
        Grid((TI, H), (64,), ("bfloat16",)),
    ),
    "full": (
        Grid((TI, S, B, L, H), (1, 8, 64, 256), ("float32", *HALVES)),
        Grid(LARGE, (1, 8, 64), ("float32", *HALVES)),
        Grid((TI, S, B, L), (64, 256), ("float32", *HALVES), (TRAINING,)),
        Grid(LARGE, (64,), ("float32", *HALVES), (TRAINING,)),
        Grid((S, B), (1, 8), (INT8,)),
    ),
}


def grid(
    name: str,
    models: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    directions: Sequence[str] = (),
    sizes: Sequence[int] = (),
) -> list[Case]:
    """The cases of a grid of `GRIDS`; what is given stands in place of what the grid says of that axis.

    Raises:
        ValueError: a combination that cannot be measured, see `Case`.
    """
    given = {"models": models, "batches": batches, "dtypes": dtypes, "directions": directions, "sizes": sizes}
    axes = {axis: tuple(values) for axis, values in given.items() if values}
    return list(dict.fromkeys(case for one in GRIDS[name] for case in replace(one, **axes).cases()))


def variant(model: str, size: tuple[int, int], direction: str) -> list[str]:
    """What a title says beside model, batch and dtype: a size that is not the model's own, a direction but forward."""
    from fastvit.config import PRESETS

    own = pair(PRESETS[model].img_size) if model in PRESETS else size
    height, width = size
    side = str(height) if height == width else f"{height} x {width}"
    return [*([] if size == own else [f"{side} px"]), *([] if direction == FORWARD else [direction])]


def macs(config: ViTConfig) -> int:
    """Multiply-adds of one image's forward pass, the two attention products included.

    patches D C P Q + depth (N (3 D^2 + D^2 + 2 D F) + 2 N^2 D) + rows (D R + R K), where rows is 1 after pooling and
    N without, and R = D without a representation layer (whose D R then is absent); before it a hybrid's convolutions.
    """
    D, N, F = config.embed_dim, tokens(config), config.hidden_dim
    block = N * (4 * D**2 + 2 * D * F) + 2 * N**2 * D
    rows = 1 if config.global_pool else N
    ends = patches(config) * D * patch_values(config) + rows * head_weights(config)
    return sum(one.macs for one in stems.convolutions(config)) + config.depth * block + ends


def flops(config: ViTConfig, batch: int) -> int:
    """Floating-point operations of a forward pass: two for each multiply-add of a matrix product, none for the rest."""
    return 2 * macs(config) * batch


def traffic(config: ViTConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes of a forward pass if every fused op reads its inputs and writes its outputs once, and weights once.

    Per block and token: layer_norm 2 D, qkv 4 D, attention 4 D, projection with residual 3 D, norm_mlp's norm 2 D,
    fc1 D + F, fc2 with residual F + 2 D. Vectors (biases, norms) are too small to count. A hybrid's convolutions read
    their input and write their output, which a norm reads and writes again.
    """
    D, N, F = config.embed_dim, tokens(config), config.hidden_dim
    weights = D * patch_values(config) + N * D + config.depth * (4 * D**2 + 2 * D * F) + head_weights(config)
    ends = patches(config) * patch_values(config) + 3 * N * D + config.num_classes
    stem = stems.convolutions(config)
    weights += sum(one.weights for one in stem)
    ends += sum(one.read + 3 * one.written for one in stem)
    return dtype.itemsize * (weights + batch * (ends + config.depth * N * (18 * D + 2 * F)))


def patches(config: ViTConfig) -> int:
    """Patches of an image."""
    rows, columns = config.grid_size
    return rows * columns


def tokens(config: ViTConfig) -> int:
    """N, patches and prefix tokens."""
    return patches(config) + config.prefix_tokens


def patch_values(config: ViTConfig) -> int:
    """C P Q, the numbers in a patch: of pixels, or of a hybrid's feature map."""
    (P, Q), stride = pair(config.patch_size), config.backbone_stride
    return stems.channels(config) * (P // stride) * (Q // stride)


def head_weights(config: ViTConfig) -> int:
    """Weights of the classifier, and of the representation layer before it."""
    D, R, K = config.embed_dim, config.representation_size, config.num_classes
    return D * K if R is None else D * R + R * K


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
