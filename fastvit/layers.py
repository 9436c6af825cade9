"""The modules of a Vision Transformer: parameters under timm's names, and one op call each.

The forwards, :func:`fused_block` among them, read nothing of their module but attributes that timm's modules have as
well, so that the integrations can bind them to those. A module whose children carry hooks calls its children instead.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import Size, pair
from .resample import resample_patch_weight


# where accelerate leaves the names of the ops that a module's fused forward calls
MARK = "_fastvit_ops"
BLOCK_OPS = ("encoder", "layer_norm", "linear", "attention", "norm_mlp")


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the GELU of the original CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATION_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}


def activation_name(module: nn.Module) -> str | None:
    """The ops' name of an activation module (torch's, timm's or ours), or None when the ops have no such activation."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(module).__name__)


def _active(dropout: nn.Module) -> bool:
    """Whether a dropout or drop-path module changes its input now."""
    return dropout.training and getattr(dropout, "p", getattr(dropout, "drop_prob", 0.0)) > 0.0


def _drop_path_rate(drop_path: Any) -> float | None:
    """The rate an op has to drop branches at in this module's place, or None where the module must be called itself."""
    if not _active(drop_path):
        return 0.0
    plain = type(drop_path).__name__ == "DropPath" and getattr(drop_path, "scale_by_keep", True)
    return drop_path.drop_prob if plain and drop_path.drop_prob < 1.0 else None


def _norm_args(norm: Any) -> tuple[Tensor | None, Tensor | None, float] | None:
    return None if isinstance(norm, nn.Identity) else (norm.weight, norm.bias, norm.eps)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module below this one carries a forward or backward hook, which a fused forward would skip.

    Always False while torch.compile traces, which does not follow hooks added later either.
    """
    return not torch.compiler.is_compiling() and _child_has_hooks(module)


def _child_has_hooks(module: nn.Module) -> bool:
    for child in module._modules.values():  # runs in every forward: Module.modules() takes five times as long
        if child is not None and (
            child._forward_hooks
            or child._forward_pre_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
            or _child_has_hooks(child)
        ):
            return True
    return False


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
        if not _active(self):
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
        if patch_size is not None and pair(patch_size, "patch_size") != self.patch_size:
            self.patch_size = pair(patch_size, "patch_size")
            proj, weight = self.proj, self.proj.weight
            resampled = resample_patch_weight(weight.detach(), self.patch_size)
            proj.weight = nn.Parameter(resampled, requires_grad=weight.requires_grad)
            proj.kernel_size = proj.stride = self.patch_size
        self.img_size = pair(self.img_size if img_size is None else img_size, "img_size")
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patches along height and width of an image of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor, pos_embed: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        if x.dim() == 4 and self.strict_img_size:
            if tuple(x.shape[2:]) != self.img_size:
                raise ValueError(
                    f"fastvit: image size {tuple(x.shape[2:])} does not match the model's {self.img_size}; "
                    "use dynamic_img_size=True or set_input_size()"
                )
            x = x[..., : self.grid_size[0] * self.patch_size[0], : self.grid_size[1] * self.patch_size[1]]
        normalise = {"mean": self.mean, "std": self.std} if x.dtype == torch.uint8 else {}
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, pos_embed, prefix, **normalise)


class Attention(nn.Module):
    """Multi-head self-attention on a packed qkv projection (paper, appendix A)."""

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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.proj_drop(self.proj(_attend(self, self.qkv(x), attn_mask, is_causal)))


def _attend(attn: Any, qkv: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """What an attention module computes between its projections, (B, N, 3·D) to (B, N, D)."""
    return ops.attention_packed(
        qkv,
        attn.num_heads,
        q_norm=_norm_args(attn.q_norm),
        k_norm=_norm_args(attn.k_norm),
        mask=attn_mask,
        causal=is_causal,
        scale=attn.scale,
        dropout=attn.attn_drop.p if attn.training else 0.0,
    )


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
        hidden = ops.linear(x, self.fc1.weight, self.fc1.bias, activation=activation_name(self.act))
        return self.drop2(ops.linear(self.drop1(hidden), self.fc2.weight, self.fc2.bias))


class Block(nn.Module):
    """Pre-norm encoder block: x + MSA(LN(x)), then x + MLP(LN(x)) (paper, equations 2 and 3)."""

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
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, norm_eps, device, dtype)
        self.attn = Attention(
            dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_eps, device, dtype
        )
        self.ls1 = LayerScale(dim, init_values, device, dtype) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim, norm_eps, device, dtype)
        self.mlp = Mlp(dim, hidden_dim, act_layer, proj_bias, proj_drop, device, dtype)
        self.ls2 = LayerScale(dim, init_values, device, dtype) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if has_hooks(self):
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return fused_block(self, x, attn_mask, is_causal)


def fused_blocks(blocks: Any, x: Tensor) -> Tensor:
    """A sequence of blocks (ours or timm's) in one op where a backend has one for them all, else block by block."""
    y = _run_encoder(list(blocks), x)
    if y is None:
        for block in blocks:
            x = block(x)
    return x if y is None else y


def _run_encoder(blocks: list[Any], x: Tensor) -> Tensor | None:
    """All blocks by one kernel, or None where none serves, or what they compute is more than it does."""
    if x.dim() != 3 or not blocks or not _plain(blocks[0]):
        return None
    first = blocks[0].attn
    heads, scale, activation = first.num_heads, first.scale, activation_name(blocks[0].mlp.act)
    parameters, eps = list[Tensor | None](), list[float]()
    for block in blocks:
        if not _plain(block):
            return None
        attn, mlp, norm1, norm2 = block.attn, block.mlp, block.norm1, block.norm2
        qkv, proj, fc1, fc2 = attn.qkv, attn.proj, mlp.fc1, mlp.fc2
        if (attn.num_heads, attn.scale, activation_name(mlp.act)) != (heads, scale, activation):
            return None
        gamma1, gamma2 = _gamma(block.ls1), _gamma(block.ls2)
        parameters += (norm1.weight, norm1.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, gamma1)
        parameters += (norm2.weight, norm2.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, gamma2)
        eps += (norm1.eps, norm2.eps)
    return ops.run_encoder(x, parameters, eps, heads, scale, activation)


def _plain(block: Any) -> bool:
    """Whether a block is one that fused_block serves, and computes no more than the encoder's kernels now."""
    if block.__dict__.get(MARK) != BLOCK_OPS and type(block).forward is not Block.forward:
        return False
    attn, mlp = block.attn, block.mlp
    if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
        return False
    if not block.training:
        return True
    dropouts = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2, block.drop_path1, block.drop_path2)
    return not any(map(_active, dropouts))


def fused_block(block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """A block (ours or timm's) in a handful of ops, its children's parameters read and their forwards skipped."""
    y = None if is_causal or attn_mask is not None else _run_encoder([block], x)
    if y is not None:
        return y
    attn = block.attn
    normalised = ops.layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    heads = _attend(attn, ops.linear(normalised, attn.qkv.weight, attn.qkv.bias), attn_mask, is_causal)
    x = _add_branch(x, heads, attn.proj, attn.proj_drop, block.ls1, block.drop_path1)
    return _add_mlp(x, block.norm2, block.mlp, block.ls2, block.drop_path2)


def _gamma(layer_scale: Any) -> Tensor | None:
    return None if isinstance(layer_scale, nn.Identity) else layer_scale.gamma


def _add_branch(
    x: Tensor, h: Tensor, linear: nn.Linear, dropout: nn.Module, layer_scale: nn.Module, drop_path: nn.Module
) -> Tensor:
    """x + drop_path(layer_scale(dropout(linear(h)))), in one op when the dropout is inactive."""
    if _active(dropout):
        return x + drop_path(layer_scale(dropout(ops.linear(h, linear.weight, linear.bias))))
    rate, gamma = _drop_path_rate(drop_path), _gamma(layer_scale)
    if rate is None:
        return x + drop_path(ops.linear(h, linear.weight, linear.bias, layer_scale=gamma))
    return ops.linear(h, linear.weight, linear.bias, layer_scale=gamma, residual=x, drop_path=rate)


def _add_mlp(x: Tensor, norm: nn.LayerNorm, mlp: Mlp, layer_scale: nn.Module, drop_path: nn.Module) -> Tensor:
    """x + drop_path(layer_scale(mlp(norm(x)))), in one op when no dropout is active."""
    activation = activation_name(mlp.act)
    if _active(mlp.drop1) or _active(mlp.drop2):
        normalised = ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        hidden = ops.linear(normalised, mlp.fc1.weight, mlp.fc1.bias, activation=activation)
        return _add_branch(x, mlp.drop1(hidden), mlp.fc2, mlp.drop2, layer_scale, drop_path)
    rate = _drop_path_rate(drop_path)
    y = ops.norm_mlp(
        x,
        norm.weight,
        norm.bias,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
        norm.eps,
        activation=activation,
        layer_scale=_gamma(layer_scale),
        residual=rate is not None,
        drop_path=rate or 0.0,
    )
    return x + drop_path(y) if rate is None else y


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
