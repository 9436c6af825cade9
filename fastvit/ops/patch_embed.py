"""Patch embedding: z₀ = [prefix; x_p¹E; ...; x_pᴺE] + E_pos, straight from the image.

Equation 1 of "An Image is Worth 16x16 Words" (arXiv 2010.11929).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _contract as contract


def _add_positions(patches: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Prefix tokens in front of patches (B, N, D); positions for every token, or for the patches alone."""
    if pos_embed is not None and pos_embed.shape[0] == patches.shape[1]:
        patches, pos_embed = patches + pos_embed, None
    if prefix is not None:
        patches = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
    return patches if pos_embed is None else patches + pos_embed


def _per_channel(values: Sequence[float], image: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=image.device)[:, None, None]


def _normalise(
    image: Tensor, pixel_scale: Sequence[float] | None, pixel_shift: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    if pixel_scale is None or pixel_shift is None:
        return image
    wide = image.to(torch.promote_types(dtype, torch.float32))
    return (wide * _per_channel(pixel_scale, image) + _per_channel(pixel_shift, image)).to(dtype)


def reference(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    pixel_scale: Sequence[float] | None,
    pixel_shift: Sequence[float] | None,
) -> Tensor:
    """Plain PyTorch: a strided convolution, concatenation, sum."""
    image = _normalise(image, pixel_scale, pixel_shift, weight.dtype)
    patches = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return _add_positions(patches, pos_embed, prefix)


def reference_backward(
    dy: Tensor,
    image: Tensor,
    weight: Tensor,
    pixel_scale: Sequence[float] | None,
    pixel_shift: Sequence[float] | None,
    positions: int,
    prefix: int,
    image_grad: bool,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dimage, dweight, dbias, dpos_embed, dprefix); ``positions`` and ``prefix`` are row counts.

    The patches are rows of a matrix X (B·N, C·P·Q), so dweight = dpatchesᵀ X and dX = dpatches W.
    """
    batch, channels, height, width = image.shape
    dim, _, p, q = weight.shape
    grid = (height // p, width // q)
    pixels = _normalise(image, pixel_scale, pixel_shift, weight.dtype)
    x = pixels.reshape(batch, channels, grid[0], p, grid[1], q).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * p * q)
    wide = torch.promote_types(dy.dtype, torch.float32)
    patches = dy[:, prefix:].reshape(-1, dim)
    total = dy.sum(0, dtype=wide)
    dweight = product(patches.t(), x).view_as(weight)
    dbias = total[prefix:].sum(0)
    dpos = total[total.shape[0] - positions :] if positions else contract.absent(total)
    dimage = contract.absent(dy)
    if image_grad:
        dx = product(patches, weight.reshape(dim, -1)).view(batch, *grid, channels, p, q)
        dimage = dx.permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
        if pixel_scale is not None:
            dimage = (dimage.to(wide) * _per_channel(pixel_scale, image)).to(dy.dtype)
    dbias, dpos, dprefix = (t.to(dy.dtype).clone() for t in (dbias, dpos, total[:prefix]))
    return dimage, dweight, dbias, dpos, dprefix


def _forward(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    pixel_scale: Sequence[float] | None,
    pixel_shift: Sequence[float] | None,
    backend: str,
) -> Tensor:
    launch = backends.implementation("patch_embed", backend).forward
    return launch(image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift)


def _fake(image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift, backend):
    batch, _, height, width = image.shape
    dim, _, p, q = weight.shape
    tokens = (height // p) * (width // q) + (0 if prefix is None else prefix.shape[0])
    return weight.new_empty(batch, tokens, dim)


def _backward(
    dy: Tensor,
    image: Tensor,
    weight: Tensor,
    pixel_scale: Sequence[float] | None,
    pixel_shift: Sequence[float] | None,
    positions: int,
    prefix: int,
    image_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = contract.backward_launcher("patch_embed", backend, reference_backward)
    dy = contract.unit_stride(dy)
    return launch(dy, image, weight, pixel_scale, pixel_shift, positions, prefix, image_grad)


def _backward_fake(dy, image, weight, pixel_scale, pixel_shift, positions, prefix, image_grad, backend):
    dim = weight.shape[0]
    dpos = dy.new_empty(positions, dim) if positions else contract.absent(dy)
    dimage = dy.new_empty(image.shape) if image_grad else contract.absent(dy)
    return dimage, weight.new_empty(weight.shape), dy.new_empty(dim), dpos, dy.new_empty(prefix, dim)


def _setup_context(ctx, inputs, output):
    image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift, backend = inputs
    ctx.positions = 0 if pos_embed is None else pos_embed.shape[0]
    ctx.prefix = 0 if prefix is None else prefix.shape[0]
    ctx.has_bias, ctx.backend = bias is not None, backend
    ctx.pixels = pixel_scale, pixel_shift
    ctx.save_for_backward(image, weight)


def _autograd(ctx, dy):
    image_grad = ctx.needs_input_grad[0]
    dimage, dweight, dbias, dpos, dprefix = _backward_op(
        dy, *ctx.saved_tensors, *ctx.pixels, ctx.positions, ctx.prefix, image_grad, ctx.backend
    )
    return (
        dimage if image_grad else None,
        dweight,
        dbias if ctx.has_bias else None,
        dpos if ctx.positions else None,
        dprefix if ctx.prefix else None,
        None,
        None,
        None,
    )


_op, _backward_op = contract.register(
    "patch_embed", _forward, _fake, _backward, _backward_fake, _setup_context, _autograd
)


def _table(name: str, value: Tensor | None, weight: Tensor) -> Tensor | None:
    """A (1, L, D) or (L, D) parameter as (L, D), checked against weight."""
    if value is None:
        return None
    contract.check_tensor("patch_embed", name, value, (2, 3))
    table = value[0] if value.dim() == 3 and value.shape[0] == 1 else value
    if table.dim() != 2:
        raise ValueError(f"fastvit.patch_embed: {name} must be (L, D) or (1, L, D), got shape {tuple(value.shape)}")
    contract.check_like("patch_embed", name, table, "weight", weight, (table.shape[0], weight.shape[0]))
    return contract.unit_stride(table)


def _pixel_affine(
    image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float] | None, list[float] | None]:
    """scale and shift per channel with pixel * scale + shift = (pixel / range - mean) / std."""
    if mean is None and std is None and image.dtype != torch.uint8:
        return None, None
    channels = image.shape[1]
    mean = [0.0] * channels if mean is None else [float(m) for m in mean]
    std = [1.0] * channels if std is None else [float(s) for s in std]
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != channels:
            raise ValueError(
                f"fastvit.patch_embed: {name} must have one entry per channel ({channels}), got {len(value)}"
            )
    if not all(s > 0 for s in std):
        raise ValueError(f"fastvit.patch_embed: std must be positive, got {tuple(std)}")
    white = 255.0 if image.dtype == torch.uint8 else 1.0
    return [1.0 / (white * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def prepare_patch_embed(image, weight, bias=None, pos_embed=None, prefix=None, *, mean=None, std=None):
    """Check the public arguments and turn them into the launchers'."""
    op = "patch_embed"
    contract.check_tensor(op, "weight", weight, 4)
    if not isinstance(image, Tensor):
        raise TypeError(f"fastvit.{op}: image must be a Tensor, got {type(image).__name__}")
    if image.dim() != 4:
        raise ValueError(f"fastvit.{op}: image must be (B, C, height, width), got shape {tuple(image.shape)}")
    if image.dtype not in (weight.dtype, torch.uint8):
        raise TypeError(f"fastvit.{op}: image must have weight's dtype {weight.dtype} or uint8, got {image.dtype}")
    if image.device != weight.device:
        raise ValueError(f"fastvit.{op}: image must be on weight's device {weight.device}, got {image.device}")
    dim, channels, p, q = weight.shape
    if min(p, q) < 1 or image.shape[1] != channels or image.shape[2] % p or image.shape[3] % q:
        raise ValueError(
            f"fastvit.{op}: image must be (B, {channels}, a multiple of {p}, a multiple of {q}) "
            f"for weight {tuple(weight.shape)}, got shape {tuple(image.shape)}"
        )
    contract.check_like(op, "bias", bias, "weight", weight, (dim,))
    prefix, pos_embed = _table("prefix", prefix, weight), _table("pos_embed", pos_embed, weight)
    patches = (image.shape[2] // p) * (image.shape[3] // q)
    tokens = patches + (0 if prefix is None else prefix.shape[0])
    if pos_embed is not None and pos_embed.shape[0] not in (patches, tokens):
        raise ValueError(
            f"fastvit.{op}: pos_embed must have {tokens} rows (all tokens) or {patches} (patches), "
            f"got {pos_embed.shape[0]}"
        )
    return image, weight.contiguous(), contract.unit_stride(bias), pos_embed, prefix, *_pixel_affine(image, mean, std)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Tokens of an image: [prefix; patches · Wᵀ + b] + positions.

    Args:
        image: (B, C, height, width), any strides, weight's dtype or uint8 (0..255); height and width are multiples of
            the patch's.
        weight: (D, C, P, Q), a convolution's; bias: (D,) or None.
        pos_embed: (L, D) or (1, L, D) with L = prefix + N rows (added to all tokens) or N (to the patches), or None.
        prefix: (n, D) or (1, n, D): class and register tokens, or None.
        mean, std: per channel; pixels enter as (pixel - mean) / std, after division by 255 for uint8.

    Returns:
        (B, n + N, D), contiguous, N = height·width / (P·Q) patches in row-major order.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.
    """
    low = None if not isinstance(weight, Tensor) else contract.autocast_dtype(weight)
    if low is not None:
        image = image if image.dtype == torch.uint8 else image.to(low)
        weight, bias = contract.cast(low, weight, bias)
        prefix, pos_embed = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (prefix, pos_embed))
        patches = _run(prepare_patch_embed(image, weight, bias, mean=mean, std=std))
        return _add_positions(patches, pos_embed, prefix)
    return _run(prepare_patch_embed(image, weight, bias, pos_embed, prefix, mean=mean, std=std))


def _run(args) -> Tensor:
    backend = backends.select("patch_embed", *args)
    return reference(*args) if backend == "reference" else _op(*args, backend)
