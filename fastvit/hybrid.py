"""Hybrids: the patches are the positions of a ResNet's feature map (paper, section 3.1), down to P = 1.

The ResNet has weight-standardised convolutions (arXiv 1903.10520) with SAME padding and GroupNorm for BatchNorm (paper,
section 4.1). Modules and parameters carry timm's names.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from . import ops, prepack
from .config import Size, pair
from .layers import resize_projection
from .ops._contract import autocasting
from .watch import observed

GROUPS, STEM_WIDTH, EXPANSION = 32, 64, 4
# of GroupNorm: timm's, and flax's default, which the original takes
GROUP_NORM_EPS = {"timm": 1e-5, "original": 1e-6}


def standardised(weight: Tensor, eps: str) -> Tensor:
    """Each filter of (O, I, k, k) with mean 0 and variance 1.

    "timm": (w - mean) / sqrt(var + 1e-8)        "original": (w - mean) / (std + 1e-5)
    """
    if eps == "timm":  # one group for each filter: a third of the time of a BatchNorm over the filters
        filters = weight.reshape(1, weight.shape[0], -1)
        return F.group_norm(filters, weight.shape[0], eps=1e-8).view(weight.shape)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    centred = wide - wide.mean(1, keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=1, keepdim=True) * wide.shape[1] ** -0.5
    return (centred * (std + 1e-5).reciprocal()).to(weight.dtype).view(weight.shape)


def standardised_once(weight: Tensor, eps: str) -> Tensor:
    """The same, kept for inference on a CPU until the weight changes."""
    differentiable = torch.is_grad_enabled() and weight.requires_grad
    if differentiable or type(weight) is not nn.Parameter or observed():  # a shard of FSDP2's, a released one
        return standardised(weight, eps)
    return prepack.derived(weight, f"standardised, {eps}", lambda: standardised(weight, eps))


class StdConv2d(nn.Conv2d):
    """Convolution with standardised weights, (B, I, h, w) to (B, O, ceil(h / stride), ceil(w / stride)).

    SAME padding: as much as that needs, the odd row or column at the bottom or right.
    """

    def __init__(self, inputs: int, outputs: int, side: int, stride: int, eps: str, device=None, dtype=None) -> None:
        self.eps = eps
        super().__init__(inputs, outputs, side, stride, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self._padding(size) for size in x.shape[-2:])
        weight = standardised_once(self.weight, self.eps)
        if height % 2 == 0 and width % 2 == 0:
            return F.conv2d(x, weight, None, self.stride, (height // 2, width // 2))
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, weight, None, self.stride)

    def _padding(self, size: int) -> int:
        side, stride = self.kernel_size[0], self.stride[0]
        return max((-(-size // stride) - 1) * stride + side - size, 0)


class GroupNormAct(nn.GroupNorm):
    """GroupNorm over 32 groups of channels of (B, C, h, w), with ReLU behind it if asked for."""

    _fastvit_ops = ("group_norm",)

    def __init__(self, channels: int, eps: str, relu: bool = True, device=None, dtype=None) -> None:
        super().__init__(GROUPS, channels, GROUP_NORM_EPS[eps], device=device, dtype=dtype)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, relu=self.relu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"


class MaxPool(nn.Module):
    """Maxima over 3 x 3 at stride 2 with SAME padding: (B, C, h, w) to (B, C, ceil(h / 2), ceil(w / 2))."""

    def forward(self, x: Tensor) -> Tensor:
        # an odd size lacks a row on either side; an even one a row behind, where ceil_mode lets the last window end
        return F.max_pool2d(x, 3, 2, padding=(x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)


class Downsample(nn.Module):
    """The projection of a shortcut: convolution 1 x 1, GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int, eps: str, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = StdConv2d(inputs, outputs, 1, stride, eps, device, dtype)
        self.norm = GroupNormAct(outputs, eps, False, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """relu(x + norm3(conv3(...norm1(conv1(x))))) with convolutions 1 x 1, 3 x 3 (which has the stride), 1 x 1."""

    def __init__(self, inputs: int, hidden: int, stride: int, first: bool, eps: str, device=None, dtype=None) -> None:
        super().__init__()
        outputs = EXPANSION * hidden
        self.downsample = Downsample(inputs, outputs, stride, eps, device, dtype) if first else None
        self.conv1 = StdConv2d(inputs, hidden, 1, 1, eps, device, dtype)
        self.norm1 = GroupNormAct(hidden, eps, True, device, dtype)
        self.conv2 = StdConv2d(hidden, hidden, 3, stride, eps, device, dtype)
        self.norm2 = GroupNormAct(hidden, eps, True, device, dtype)
        self.conv3 = StdConv2d(hidden, outputs, 1, 1, eps, device, dtype)
        self.norm3 = GroupNormAct(outputs, eps, False, device, dtype)
        nn.init.zeros_(self.norm3.weight)  # each begins as its shortcut, in timm and in the original

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return torch.relu_(self.norm3(self.conv3(y)) + shortcut)


class Stage(nn.Module):
    """Bottlenecks at one resolution; the first one gets there."""

    def __init__(self, inputs: int, hidden: int, stride: int, depth: int, eps: str, device=None, dtype=None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(
            Bottleneck(inputs, hidden, stride, True, eps, device, dtype),
            *(Bottleneck(EXPANSION * hidden, hidden, 1, False, eps, device, dtype) for _ in range(depth - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return self.blocks(x)
        for block in self.blocks:
            x = recompute(block, x, use_reentrant=False)
        return x


class ResNet(nn.Module):
    """A stem at stride 4 and stages of ``layers`` bottlenecks, each but the first halving height and width."""

    def __init__(self, layers: Sequence[int], stem: nn.Module, eps: str, device=None, dtype=None) -> None:
        super().__init__()
        self.stem = stem
        stages, inputs = [], STEM_WIDTH
        for i, depth in enumerate(layers):
            hidden = STEM_WIDTH * 2**i
            stages.append(Stage(inputs, hidden, 2 if i else 1, depth, eps, device, dtype))
            inputs = EXPANSION * hidden
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


class Projection(nn.Conv2d):
    """Tokens of a feature map: projection, positions and prefix tokens in one op."""

    _fastvit_ops = ("patch_embed",)

    def forward(self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        p, q = self.kernel_size
        rows, columns = x.shape[-2] // p, x.shape[-1] // q
        return ops.patch_embed(x[..., : rows * p, : columns * q], self.weight, self.bias, pos_embed, prefix)


class HybridEmbed(nn.Module):
    """Image to tokens through a ResNet: its feature map is projected as an image is by ``PatchEmbed``.

    Args:
        layers: bottlenecks of each stage, none for the stem alone.
        stride: of the feature map, in pixels.
        eps: "timm" or "original" (see :func:`standardised` and ``GROUP_NORM_EPS``).
        patch_size: in pixels, a multiple of stride: P = patch_size / stride positions of the feature map.
        strict_img_size: refuse images that are not of img_size.
        mean, std: normalise the pixels of a uint8 image after division by 255; a float image is taken as it is.

    An image of (height, width) has ceil(height / stride) // P rows of patches and as many columns by its width.
    """

    def __init__(
        self,
        layers: Sequence[int],
        stride: int,
        eps: str,
        img_size: Size,
        patch_size: Size,
        in_chans: int,
        embed_dim: int,
        bias: bool,
        strict_img_size: bool,
        mean: Sequence[float],
        std: Sequence[float],
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_chans, self.stride = in_chans, stride
        self.strict_img_size, self.mean, self.std = strict_img_size, mean, std
        stem = nn.Sequential(
            OrderedDict(
                conv=StdConv2d(in_chans, STEM_WIDTH, 7, 2, eps, device, dtype),
                norm=GroupNormAct(STEM_WIDTH, eps, True, device, dtype),
                pool=MaxPool(),
            )
        )
        self.backbone = ResNet(layers, stem, eps, device, dtype) if layers else stem
        features = EXPANSION * STEM_WIDTH * 2 ** (len(layers) - 1) if layers else STEM_WIDTH
        self.patch_size = pair(patch_size, "patch_size")
        kernel = self._kernel(self.patch_size)
        self.proj = Projection(features, embed_dim, kernel, kernel, bias=bias, device=device, dtype=dtype)
        self.img_size = pair(img_size, "img_size")
        self.set_input_size()

    def _kernel(self, patch_size: tuple[int, int]) -> tuple[int, int]:
        p, q = patch_size
        if p % self.stride or q % self.stride:
            raise ValueError(
                f"fastvit: patch_size must be a multiple of the backbone's stride {self.stride}, got {p, q}"
            )
        return p // self.stride, q // self.stride

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size, or the patch size by resampling the projection (FlexiViT, arXiv 2212.08013)."""
        image = pair(self.img_size if img_size is None else img_size, "img_size")
        patch = pair(self.patch_size if patch_size is None else patch_size, "patch_size")
        self.grid_size = self.grid_at(image, patch)
        resize_projection(self.proj, self._kernel(patch))
        self.img_size, self.patch_size = image, patch
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per patch, the larger side's or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patches along height and width of an image of this size."""
        return self.grid_at(img_size, self.patch_size)

    def grid_at(self, img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
        """Patches of this size along height and width of an image of that size, at least one."""
        (height, width), (p, q), stride = img_size, self._kernel(patch_size), self.stride
        rows, columns = -(-height // stride) // p, -(-width // stride) // q
        if rows < 1 or columns < 1:
            raise ValueError(f"fastvit: image must hold at least one patch of {patch_size} pixels, got {img_size}")
        return rows, columns

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each bottleneck in the backward pass instead of keeping its activations."""
        for module in self.backbone.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def forward(
        self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None, any_size: bool = False
    ) -> Tensor:
        dtype = self.proj.weight.dtype
        self._check(x, dtype, any_size)
        x = self._normalised(x, dtype) if x.dtype == torch.uint8 else x
        if dtype.itemsize == 2 or autocasting(x):
            # where fp32's convolutions do not care, those of 16 bits take 20 % less time on a CPU
            x = x.contiguous(memory_format=torch.channels_last)
        return self.proj(self.backbone(x), pos_embed, prefix)

    def _check(self, x: Tensor, dtype: torch.dtype, any_size: bool) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"fastvit: image must be (B, {self.in_chans}, height, width), got shape {tuple(x.shape)}")
        size = (x.shape[-2], x.shape[-1])
        if self.strict_img_size and not any_size and size != self.img_size:
            raise ValueError(
                f"fastvit: image size {size} does not match the model's {self.img_size}; "
                "use dynamic_img_size=True or set_input_size()"
            )
        if x.dtype not in (dtype, torch.uint8) and not autocasting(x):
            raise TypeError(f"fastvit: image must have the model's dtype {dtype} or uint8, got {x.dtype}")

    def _normalised(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        # numbers, not tensors: those would be copied to the device at each call
        wide = torch.promote_types(dtype, torch.float32)
        each = zip(x.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(c.to(wide) * (1 / (255 * std)) - mean / std).to(dtype) for c, mean, std in each], 1)
