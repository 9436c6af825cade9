"""The modules of a Vision Transformer: parameters under timm's names, and one op call each.

The forwards read nothing of their module but attributes that timm's modules have as well, so that the integrations can
bind them to those. A module whose children carry hooks calls its children instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import Size, pair
from .fused import BLOCK_OPS, active, attend, fused_block, has_hooks
from .parts import activation_of, attention_parts, block_parts
from .resample import resample_patch_weight


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the GELU of the original CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATION_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, eps 1e-6."""

    def __init__(self, dim: int, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, dim: int, init_values: float, device=None, dtype=None) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, each sample's branch is dropped with probability drop_prob."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not active(self):
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class PatchDropout(nn.Module):
    """In training, keeps a random share 1 - prob of the patches of each image (arXiv 2212.00794), never the prefix."""

    def __init__(self, prob: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.prob, self.num_prefix_tokens = prob, num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, tokens, dim = patches.shape
        kept = torch.rand(batch, tokens, device=x.device).argsort(-1)[:, : max(1, int(tokens * (1.0 - self.prob)))]
        return torch.cat([prefix, patches.gather(1, kept[..., None].expand(-1, -1, dim))], dim=1)


def resize_projection(proj: nn.Conv2d, patch_size: tuple[int, int]) -> None:
    """Resample a projection of patches for another patch size (FlexiViT, arXiv 2212.08013)."""
    weight = proj.weight
    if tuple(weight.shape[2:]) != patch_size:
        resampled = resample_patch_weight(weight.detach(), patch_size)
        proj.weight = nn.Parameter(resampled, requires_grad=weight.requires_grad)
        proj.kernel_size = proj.stride = patch_size


class PatchEmbed(nn.Module):
    """Image to tokens: projection, positions and prefix tokens in one op (paper, equation 1).

    The pixels of a uint8 image enter as (pixel / 255 - mean) / std per channel; a float image is taken as it is.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.strict_img_size, self.mean, self.std = strict_img_size, mean, std
        self.patch_size = pair(patch_size, "patch_size")
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, device=device, dtype=dtype
        )
        self.img_size = pair(img_size, "img_size")
        self.set_input_size()

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size, or the patch size by resampling the projection (FlexiViT, arXiv 2212.08013)."""
        if patch_size is not None:
            self.patch_size = pair(patch_size, "patch_size")
            resize_projection(self.proj, self.patch_size)
        self.img_size = pair(self.img_size if img_size is None else img_size, "img_size")
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def grid_at(self, img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
        """Patches of this size along height and width of an image of that size."""
        return img_size[0] // patch_size[0], img_size[1] // patch_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patches along height and width of an image of this size."""
        return self.grid_at(img_size, self.patch_size)

    def forward(
        self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None, any_size: bool = False
    ) -> Tensor:
        if x.dim() == 4 and self.strict_img_size and not any_size:
            if tuple(x.shape[2:]) != self.img_size:
                raise ValueError(
                    f"fastvit: image size {tuple(x.shape[2:])} does not match the model's {self.img_size}; "
                    "use dynamic_img_size=True or set_input_size()"
                )
            x = x[..., : self.grid_size[0] * self.patch_size[0], : self.grid_size[1] * self.patch_size[1]]
        normalise = {"mean": self.mean, "std": self.std} if x.dtype == torch.uint8 else {}
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, pos_embed, prefix, **normalise)


class Attention(nn.Module):
    """Multi-head self-attention on a packed qkv projection (paper, appendix A).

    ``relative_tokens``: N, for learned keys of relative positions (see ``fastvit.positions``), 0 for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
        relative_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = LayerNorm(self.head_dim, norm_eps, device, dtype) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(self.head_dim, norm_eps, device, dtype) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_keys: nn.Parameter | None = None
        if relative_tokens:
            keys = torch.zeros(2 * relative_tokens - 1, self.head_dim, device=device, dtype=dtype)
            self.relative_keys = nn.Parameter(keys)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, row: Any = None) -> Tensor:
        parts, qkv = attention_parts(self), self.qkv(x)
        heads = attend(parts, qkv, attn_mask, is_causal) if row is None else row.attend(parts, qkv)
        return self.proj_drop(self.proj(heads))


class Mlp(nn.Module):
    """Linear → GELU → Linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: str = "gelu",
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, device=device, dtype=dtype)
        self.act = ACTIVATION_LAYERS[act_layer]()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if has_hooks(self):
            return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
        hidden = ops.linear(x, self.fc1.weight, self.fc1.bias, activation=activation_of(self.act))
        return self.drop2(ops.linear(self.drop1(hidden), self.fc2.weight, self.fc2.bias))


class Block(nn.Module):
    """Pre-norm encoder block: x + MSA(LN(x)), then x + MLP(LN(x)) (paper, equations 2 and 3)."""

    _fastvit_ops: tuple[str, ...] = BLOCK_OPS
    _fastvit_parts = staticmethod(block_parts)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.forward is not Block.forward:  # it computes something else; FSDP2's class for a sharded block does not
            cls._fastvit_ops = ()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: str = "gelu",
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
        relative_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, norm_eps, device, dtype)
        rates = (attn_drop, proj_drop)
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, proj_bias, *rates, norm_eps, device, dtype, relative_tokens
        )
        self.ls1 = LayerScale(dim, init_values, device, dtype) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, norm_eps, device, dtype)
        self.mlp = Mlp(dim, hidden_dim, act_layer, proj_bias, proj_drop, device, dtype)
        self.ls2 = LayerScale(dim, init_values, device, dtype) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, row: Any = None) -> Tensor:
        """Tokens (B, N, D) to (B, N, D), or rows (total, D) of several images that ``row`` divides (fastvit.packed)."""
        if row is not None:
            return row.block(self, x)
        if has_hooks(self):
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return fused_block(self, x, attn_mask, is_causal)


def pool(x: Tensor, mode: str, num_prefix_tokens: int, include_prefix: bool) -> Tensor:
    """Tokens (B, N, D) to features (B, D): the first token, or mean / max / their average over the patches."""
    if mode == "":
        return x
    if mode == "token":
        return x[:, 0]
    x = x if include_prefix else x[:, num_prefix_tokens:]
    if mode == "avg":
        return x.mean(1)
    return x.amax(1) if mode == "max" else 0.5 * (x.amax(1) + x.mean(1))
