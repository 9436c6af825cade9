"""The model's options, checked once, and the named presets, as data."""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from .resample import WAYS

POOLINGS = ("token", "avg", "max", "avgmax", "")
WEIGHT_INITS = ("", "jax", "jax_nlhb", "moco", "skip", "reset", "zero_head")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
BACKBONE_EPS = ("timm", "original")
MOST_STAGES = 4
POSITIONS = ("learn", "2d", "relative", "none", "")

_CHOICES: dict[str, tuple[str, ...]] = {
    "global_pool": POOLINGS,
    "weight_init": WEIGHT_INITS,
    "act_layer": ACTIVATIONS,
    "pos_embed": POSITIONS,
    "pos_resize": tuple(WAYS),
    "backbone_eps": BACKBONE_EPS,
}

Size = int | tuple[int, int]


def pair(value: Size, name: str) -> tuple[int, int]:
    """An integer or a pair as (height, width), both positive."""
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ValueError(f"fastvit: {name} must be a positive integer or a pair of them, got {value!r}")
    return sides[0], sides[1]


@dataclass(frozen=True)
class ViTConfig:
    """Options of :class:`fastvit.VisionTransformer`, named and defaulted as timm's.

    Sizes: img_size and patch_size in pixels (an integer or (height, width)), embed_dim D, depth in blocks, num_heads H,
    mlp_ratio F / D. Rates (``*_rate``) lie in [0, 1). ``init_values`` turns LayerScale on (None or 0 = off).
    ``fc_norm`` moves the final norm behind pooling (None: for avg, max and avgmax). ``representation_size`` puts the
    original's tanh layer before the head. ``weight_init``: "" (timm), "jax", "jax_nlhb", "moco", "zero_head" (timm's
    with a zero head, the paper's fine-tuning start), "reset", "skip". ``mean`` and ``std``, a number or one for each
    channel, normalise the pixels of a uint8 image after division by 255; a float image is taken as it is.
    ``pos_embed`` is a kind of the paper's ablation (appendix D.4): "learn" (1-dimensional), "2d", "relative" or "none".
    ``pos_resize`` says how positions are interpolated for another grid, as the library of that name does: "timm",
    "transformers", "torchvision", "dinov2", "npz" or "original" (see :func:`fastvit.load_checkpoint`).

    ``backbone`` makes a hybrid, whose patches are the positions of a ResNet's feature map: the bottlenecks of each of
    its stages, (3, 4, 9) for R50 without its last stage, () for the stem alone. ``patch_size`` remains in pixels, a
    multiple of the feature map's stride, 4 · 2^(stages - 1). ``backbone_eps``: whose epsilons GroupNorm and weight
    standardisation have, "timm" (1e-5; variance + 1e-8) or "original" (1e-6; standard deviation + 1e-5).

    Raises:
        ValueError: an option out of range, or a combination that makes no model.
    """

    img_size: Size = 224
    patch_size: Size = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    pos_embed: str = "learn"
    pos_resize: str = "timm"
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    dynamic_img_size: bool = False
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    patch_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = ""
    fix_init: bool = False
    act_layer: str = "gelu"
    norm_eps: float = 1e-6
    representation_size: int | None = None
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    backbone: tuple[int, ...] | None = None
    backbone_eps: str = "timm"

    def __post_init__(self) -> None:
        if self.backbone is not None:
            self._check_backbone(self.backbone)
        if min(self.grid_size) < 1:
            raise ValueError(f"fastvit: img_size {self.img_size!r} must hold at least one patch of {self.patch_size!r}")
        for name, least in (("in_chans", 1), ("num_classes", 0), ("embed_dim", 1), ("depth", 0), ("num_heads", 1)):
            self._require(name, isinstance(getattr(self, name), int) and getattr(self, name) >= least, f">= {least}")
        self._require("reg_tokens", isinstance(self.reg_tokens, int) and self.reg_tokens >= 0, ">= 0")
        self._require("num_heads", self.embed_dim % self.num_heads == 0, f"a divisor of embed_dim {self.embed_dim}")
        self._require("mlp_ratio", int(self.embed_dim * self.mlp_ratio) >= 1, "a ratio that leaves a hidden layer")
        self._require("norm_eps", self.norm_eps >= 0, ">= 0")
        for name, valid in _CHOICES.items():
            self._require(name, getattr(self, name) in valid, f"one of {valid}")
        self._require("embed_dim", self.pos_embed != "2d" or self.embed_dim % 2 == 0, "even for pos_embed='2d'")
        if self.pos_embed == "relative" and (self.dynamic_img_size or self.patch_drop_rate):
            raise ValueError("fastvit: pos_embed='relative' goes with neither dynamic_img_size nor patch_drop_rate")
        for name in ("mean", "std"):
            each = self.of_each_channel(getattr(self, name))
            fits = len(each) == self.in_chans and all(isinstance(number, (int, float)) for number in each)
            self._require(name, fits, f"a number or {self.in_chans} of them, one for each of in_chans")
        self._require("std", all(s > 0 for s in self.of_each_channel(self.std)), "positive")
        for name in (f.name for f in fields(self) if f.name.endswith("_rate")):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "in [0, 1)")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("fastvit: global_pool='token' needs class_token=True; use 'avg', 'max', 'avgmax' or ''")

    def _check_backbone(self, layers: Any) -> None:
        stages = isinstance(layers, (tuple, list)) and len(layers) <= MOST_STAGES
        expected = f"None or at most {MOST_STAGES} numbers of bottlenecks, such as (3, 4, 9)"
        self._require("backbone", stages and all(isinstance(n, int) and n >= 1 for n in layers), expected)
        stride, sides = self.backbone_stride, pair(self.patch_size, "patch_size")
        expected = f"a multiple of {stride}, the stride of backbone {tuple(layers)}"
        self._require("patch_size", not any(side % stride for side in sides), expected)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"fastvit: {name} must be {expected}, got {getattr(self, name)!r}")

    def of_each_channel(self, value: float | tuple[float, ...]) -> tuple[float, ...]:
        """mean or std as in_chans numbers."""
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * self.in_chans

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand before the patches: class token and registers."""
        return int(self.class_token) + self.reg_tokens

    @property
    def backbone_stride(self) -> int:
        """Pixels along a side of one position of the feature map; without a backbone that is the image, so 1."""
        return 1 if self.backbone is None else 4 * 2 ** max(0, len(self.backbone) - 1)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches along height and width. A feature map's last row and column may stand for less than a stride."""
        (height, width), (p, q) = pair(self.img_size, "img_size"), pair(self.patch_size, "patch_size")
        stride = self.backbone_stride
        return -(-height // stride) // (p // stride), -(-width // stride) // (q // stride)

    @property
    def hidden_dim(self) -> int:
        """The MLP's hidden width F."""
        return int(self.embed_dim * self.mlp_ratio)


# name -> (D, depth, H, F / D): paper table 1 (Base, Large, Huge), DeiT (tiny, small), arXiv 2106.04560 (giant is g,
# gigantic G)
_SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "gigantic": (1664, 48, 16, 64 / 13),
}
_RESOLUTIONS: dict[int, tuple[int, ...]] = {8: (224, 384), 14: (224, 518), 16: (224, 384), 32: (224, 384)}

PRESETS: dict[str, ViTConfig] = {
    f"vit_{size}_patch{patch}_{side}": ViTConfig(
        img_size=side, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratio
    )
    for size, (dim, depth, heads, ratio) in _SIZES.items()
    for patch, sides in _RESOLUTIONS.items()
    for side in sides
}
# timm's name without the resolution -> (size, patch, backbone). R50 at stride 16 has the units of its fourth stage in
# the third (paper, section 4.1); S16 in the name of tiny's is none that it has
_HYBRIDS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "vit_tiny_r_s16_p8": ("tiny", 32, ()),
    "vit_small_r26_s32": ("small", 32, (2, 2, 2, 2)),
    "vit_base_r26_s32": ("base", 32, (2, 2, 2, 2)),
    "vit_base_r50_s16": ("base", 16, (3, 4, 9)),
    "vit_large_r50_s32": ("large", 32, (3, 4, 6, 3)),
}
PRESETS |= {
    f"{name}_{side}": replace(PRESETS[f"vit_{size}_patch32_{side}"], patch_size=patch, backbone=backbone)
    for name, (size, patch, backbone) in _HYBRIDS.items()
    for side in (224, 384)
    if (name, side) != ("vit_base_r26_s32", 384)  # timm has none
}

# for images of 32 pixels, such as CIFAR's: DeiT's tiny, and a smaller one that two CPU cores train in a minute
PRESETS |= {
    "vit_tiny_patch4_32": ViTConfig(img_size=32, patch_size=4, embed_dim=192, num_heads=3, num_classes=10),
    "vit_nano_patch8_32": ViTConfig(
        img_size=32, patch_size=8, embed_dim=64, depth=6, num_heads=4, mlp_ratio=2.0, num_classes=10
    ),
}


def preset(name: str) -> ViTConfig:
    """The preset of that name.

    Raises:
        ValueError: no such preset; the message lists the closest names.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=3) or sorted(PRESETS)
        raise ValueError(f"fastvit: unknown model {name!r}; close names: {', '.join(close)}. See fastvit.list_models()")
    return PRESETS[name]


def override(config: ViTConfig, options: dict[str, Any]) -> ViTConfig:
    """``config`` with some options replaced.

    Raises:
        TypeError: an option that does not exist; the message names the closest ones.
    """
    valid = [f.name for f in fields(ViTConfig)]
    unknown = [name for name in options if name not in valid]
    if unknown:
        close = difflib.get_close_matches(unknown[0], valid, n=3) or valid
        raise TypeError(f"fastvit: unknown model option {unknown[0]!r}; expected one of {', '.join(close)}")
    return replace(config, **options)
