"""What is measured, as data, and the work each case holds, by closed formulas from the model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastvit.config import ViTConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}

DEFAULT_MODELS = ("vit_base_patch16_224",)
DEFAULT_BATCHES = (1, 8)
DEFAULT_DTYPES = ("float32",)


@dataclass(frozen=True)
class Case:
    """One forward pass: a model's name, the batch B and the name of a dtype."""

    model: str
    batch: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def shape(self, config: ViTConfig) -> str:
        """The input's shape as it stands in a row: "8x3x224x224"."""
        height, width = pair(config.img_size)
        return f"{self.batch}x{config.in_chans}x{height}x{width}"


def macs(config: ViTConfig) -> int:
    """Multiply-adds of one image's forward pass, the two attention products included.

    patches D C P Q + depth (N (3 D^2 + D^2 + 2 D F) + 2 N^2 D) + rows (D R + R K), where rows is 1 after pooling and
    N without, and R = D without a representation layer (whose D R then is absent).
    """
    D, N, F = config.embed_dim, tokens(config), config.hidden_dim
    block = N * (4 * D**2 + 2 * D * F) + 2 * N**2 * D
    rows = 1 if config.global_pool else N
    return patches(config) * D * patch_values(config) + config.depth * block + rows * head_weights(config)


def flops(config: ViTConfig, batch: int) -> int:
    """Floating-point operations of a forward pass: two for each multiply-add of a matrix product, none for the rest."""
    return 2 * macs(config) * batch


def traffic(config: ViTConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes of a forward pass if every fused op reads its inputs and writes its outputs once, and weights once.

    Per block and token: layer_norm 2 D, qkv 4 D, attention 4 D, projection with residual 3 D, norm_mlp's norm 2 D,
    fc1 D + F, fc2 with residual F + 2 D. Vectors (biases, norms) are too small to count.
    """
    D, N, F = config.embed_dim, tokens(config), config.hidden_dim
    weights = D * patch_values(config) + N * D + config.depth * (4 * D**2 + 2 * D * F) + head_weights(config)
    ends = patches(config) * patch_values(config) + 3 * N * D + config.num_classes
    return dtype.itemsize * (weights + batch * (ends + config.depth * N * (18 * D + 2 * F)))


def patches(config: ViTConfig) -> int:
    """Patches of an image."""
    rows, columns = config.grid_size
    return rows * columns


def tokens(config: ViTConfig) -> int:
    """N, patches and prefix tokens."""
    return patches(config) + config.prefix_tokens


def patch_values(config: ViTConfig) -> int:
    """C P Q, the numbers in a patch."""
    P, Q = pair(config.patch_size)
    return config.in_chans * P * Q


def head_weights(config: ViTConfig) -> int:
    """Weights of the classifier, and of the representation layer before it."""
    D, R, K = config.embed_dim, config.representation_size, config.num_classes
    return D * K if R is None else D * R + R * K


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
