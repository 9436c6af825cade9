"""Patch embedding as one matrix product that reads the image by its strides, with positions and prefix tokens.

Each row of the product is a patch; the one that comes first in its image writes the prefix tokens too, so one pass
writes the whole sequence. The summed axis runs through a patch in the order in which the image lies in memory:
(C, P, Q), or (P, Q, C) where the channels of a pixel are neighbours, as in a decoded photograph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _device, _tuning_patches
from ._device import _grouped_tile


def why_not(image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift) -> str | None:
    if 0 in image.shape[2:]:
        return "triton: an image needs at least one patch"
    return _device.why_not(weight)


@triton.jit
def _patch_origin(sample, patch, PATCHES_WIDE, stride_ib, stride_iy, stride_ix,
                  P: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Offset of the first pixel of a patch, whose number counts through its image row by row."""
    y = patch // PATCHES_WIDE
    x = patch % PATCHES_WIDE
    if WIDE:
        sample = sample.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    return sample * stride_ib + y * P * stride_iy + x * Q * stride_ix


@triton.jit
def _within_patch(k, stride_ic, stride_iy, stride_ix, CHANNELS_LAST: tl.constexpr,
                  C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Channel and offset from the patch's first pixel of the numbers k within a patch."""
    if WIDE:
        k = k.to(tl.int64)
    if CHANNELS_LAST:
        # Pixels lie Q * C in a row: said so, because a sum over q and c would hide from the compiler how wide to load.
        channel = k % C
        offset = (k // (Q * C)) * stride_iy + k % (Q * C)
    else:
        channel = k // (P * Q)
        offset = channel * stride_ic + (k // Q) % P * stride_iy + k % Q * stride_ix
    return channel, offset


@triton.jit
def _of_channel(channel, VALUES: tl.constexpr, C: tl.constexpr):
    """VALUES[channel] in fp32, chosen among constants: a load would cost as much as that of the pixel."""
    chosen = tl.full(channel.shape, VALUES[0], tl.float32)
    for c in tl.static_range(1, C):
        chosen = tl.where(channel == c, VALUES[c], chosen)
    return chosen


@triton.jit
def _load_pixels(image_block, inside, channel, dtype: tl.constexpr,
                 PIXEL_SCALE: tl.constexpr, PIXEL_SHIFT: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Pixels in dtype [rows, depth], normalised if there is a scale, and 0 outside."""
    pixels = tl.load(image_block, mask=inside, other=0)
    if PIXEL_SCALE is not None:
        scale = _of_channel(channel, PIXEL_SCALE, C)[None, :]  # [1, depth]
        shift = _of_channel(channel, PIXEL_SHIFT, C)[None, :]  # [1, depth]
        # Prefix rows must stay without pixels, and 0 * scale + shift is not 0.
        normalised = tl.where(inside, pixels.to(tl.float32) * scale + shift, 0.0)  # [rows, depth]
        if pixels.dtype != dtype and dtype == tl.float32:
            # On Blackwell a dot of what was widened to fp32 ignores "ieee" and runs in tf32; a sum hides that.
            normalised = tl.sum(normalised[:, :, None], axis=2)
        pixels = normalised.to(dtype)
    return pixels


@triton.jit
def _store_prefix(prefix_ptr, pos_embed_ptr, tokens_block, is_first, column, D, PREFIX, POSITION_OFFSET,
                  stride_pn, stride_tn, HAS_POS_EMBED: tl.constexpr):  # fmt: skip
    """The prefix tokens, with positions where the table has any for them, before the first patches of images."""
    for i in range(PREFIX):
        token = tl.load(prefix_ptr + (i * stride_pn + column), mask=column < D, other=0.0).to(tl.float32)
        if HAS_POS_EMBED:
            position_mask = (column < D) & (i < POSITION_OFFSET)
            token += tl.load(pos_embed_ptr + (i * stride_tn + column), mask=position_mask, other=0.0).to(tl.float32)
        token = tl.broadcast_to(token.to(prefix_ptr.dtype.element_ty)[None, :], is_first.shape)  # [BLOCK_M, BLOCK_N]
        tl.store(tokens_block + (i - PREFIX) * D, token, mask=is_first)


@triton.jit
def _patch_embed_fwd_kernel(
    image_ptr, weight_ptr, bias_ptr, pos_embed_ptr, prefix_ptr, tokens_ptr,
    M, D, PATCHES, PATCHES_WIDE, PREFIX, POSITION_OFFSET,
    stride_ib, stride_ic, stride_iy, stride_ix, stride_pn, stride_tn,
    HAS_BIAS: tl.constexpr, HAS_POS_EMBED: tl.constexpr, HAS_PREFIX: tl.constexpr,
    PIXEL_SCALE: tl.constexpr, PIXEL_SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """tokens = patches Wᵀ + bias + positions, and before the first patch of each image its prefix tokens."""
    K: tl.constexpr = C * P * Q
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    tile_m, tile_n = _grouped_tile(M, D, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    depth = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    row_inside = (row < M)[:, None]  # [BLOCK_M, 1]
    column_inside = (column < D)[None, :]  # [1, BLOCK_N]
    sample = row // PATCHES  # [BLOCK_M]
    patch = row % PATCHES  # [BLOCK_M]
    origin = _patch_origin(sample, patch, PATCHES_WIDE, stride_ib, stride_iy, stride_ix, P, Q, WIDE)  # [BLOCK_M]
    weight_block = weight_ptr + (column.to(tl.int64)[None, :] * K + depth[:, None])  # [BLOCK_K, BLOCK_N]
    if WIDE:
        sample = sample.to(tl.int64)
        patch = patch.to(tl.int64)

    # The products are added to these: read after them, they would need registers beside the sums.
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_POS_EMBED:
        position_block = pos_embed_ptr + ((patch + POSITION_OFFSET)[:, None] * stride_tn + column[None, :])
        total += tl.load(position_block, mask=row_inside & column_inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column[None, :], mask=column_inside, other=0.0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + depth  # [BLOCK_K]
        channel, offset = _within_patch(k, stride_ic, stride_iy, stride_ix, CHANNELS_LAST, C, P, Q, WIDE)
        pixel_mask = row_inside
        weight_mask = column_inside
        if K % BLOCK_K != 0:
            pixel_mask = pixel_mask & (k < K)[None, :]
            weight_mask = weight_mask & (k < K)[:, None]
        image_block = image_ptr + (origin[:, None] + offset[None, :])  # [BLOCK_M, BLOCK_K]
        pixels = _load_pixels(image_block, pixel_mask, channel, dtype, PIXEL_SCALE, PIXEL_SHIFT, C)
        weight = tl.load(weight_block + start, mask=weight_mask, other=0.0)
        total = tl.dot(pixels, weight, total, input_precision="ieee")

    token = sample * (PREFIX + PATCHES) + PREFIX + patch  # [BLOCK_M]
    tokens_block = (tokens_ptr + token * D)[:, None] + column[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(tokens_block, total.to(dtype), mask=row_inside & column_inside)
    if HAS_PREFIX:
        is_first = row_inside & column_inside & (patch == 0)[:, None]  # [BLOCK_M, BLOCK_N]
        _store_prefix(prefix_ptr, pos_embed_ptr, tokens_block, is_first, column, D, PREFIX, POSITION_OFFSET,
                      stride_pn, stride_tn, HAS_POS_EMBED)  # fmt: skip


@triton.jit
def _patch_embed_bwd_weight_kernel(
    dy_ptr, image_ptr, partials_ptr,
    M, D, SPLIT_ROWS, stride_yb, stride_yn, stride_ib, stride_ic, stride_iy, stride_ix,
    PIXEL_SCALE: tl.constexpr, PIXEL_SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PATCHES: tl.constexpr, PATCHES_WIDE: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partials[split] = dyᵀ x over this split's patches; the grid is constant lest each row cost true divisions."""
    K: tl.constexpr = C * P * Q
    tile_m, tile_n = _grouped_tile(D, K, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    channel, offset = _within_patch(k, stride_ic, stride_iy, stride_ix, CHANNELS_LAST, C, P, Q, WIDE)
    last = tl.minimum((split + 1) * SPLIT_ROWS, M)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(split * SPLIT_ROWS, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        sample = row // PATCHES
        patch = row % PATCHES
        row_inside = (row < last)[:, None]  # [BLOCK_K, 1]
        origin = _patch_origin(sample, patch, PATCHES_WIDE, stride_ib, stride_iy, stride_ix, P, Q, WIDE)  # [BLOCK_K]
        image_block = image_ptr + (origin[:, None] + offset[None, :])  # [BLOCK_K, BLOCK_N]
        pixels = _load_pixels(image_block, row_inside & (k < K)[None, :], channel, dy_ptr.dtype.element_ty,
                              PIXEL_SCALE, PIXEL_SHIFT, C)  # fmt: skip
        if WIDE:
            sample = sample.to(tl.int64)
            patch = patch.to(tl.int64)
        dy_block = dy_ptr + ((sample * stride_yb + patch * stride_yn)[:, None] + column[None, :])  # [BLOCK_K, BLOCK_M]
        dy = tl.load(dy_block, mask=row_inside & (column < D)[None, :], other=0.0)
        total = tl.dot(dy.T, pixels, total, input_precision="ieee")

    partials_row = split.to(tl.int64) * D + column  # [BLOCK_M]
    partials_block = partials_ptr + (partials_row[:, None] * K + k[None, :])  # [BLOCK_M, BLOCK_N]
    tl.store(partials_block, total, mask=(column < D)[:, None] & (k < K)[None, :])


@triton.jit
def _patch_embed_bwd_image_kernel(
    dy_ptr, weight_ptr, dimage_ptr,
    M, D, PATCHES, PATCHES_WIDE, stride_yb, stride_yn, stride_ib, stride_ic, stride_iy, stride_ix,
    PIXEL_SCALE: tl.constexpr, C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, WIDE: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pixels of a patch = its row of dy times the weight, stored where the image has them."""
    K: tl.constexpr = C * P * Q
    tile_m, tile_n = _grouped_tile(M, K, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    depth = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    row_inside = (row < M)[:, None]  # [BLOCK_M, 1]
    k_inside = (k < K)[None, :]  # [1, BLOCK_N]
    sample = row // PATCHES  # [BLOCK_M]
    patch = row % PATCHES  # [BLOCK_M]
    channel, offset = _within_patch(k, stride_ic, stride_iy, stride_ix, False, C, P, Q, WIDE)
    origin = _patch_origin(sample, patch, PATCHES_WIDE, stride_ib, stride_iy, stride_ix, P, Q, WIDE)
    if WIDE:
        sample = sample.to(tl.int64)
        patch = patch.to(tl.int64)
    dy_block = (dy_ptr + sample * stride_yb + patch * stride_yn)[:, None] + depth[None, :]  # [BLOCK_M, BLOCK_K]
    weight_offset = depth[:, None] * K + k[None, :]  # [BLOCK_K, BLOCK_N]

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        column_inside = start + depth < D  # [BLOCK_K]
        dy = tl.load(dy_block + start, mask=row_inside & column_inside[None, :], other=0.0)
        weight = tl.load(weight_ptr + weight_offset, mask=column_inside[:, None] & k_inside, other=0.0)
        weight_ptr += BLOCK_K * K
        total = tl.dot(dy, weight, total, input_precision="ieee")

    if PIXEL_SCALE is not None:
        total *= _of_channel(channel, PIXEL_SCALE, C)[None, :]
    dimage_block = (dimage_ptr + origin)[:, None] + offset[None, :]  # [BLOCK_M, BLOCK_N]
    tl.store(dimage_block, total.to(dimage_ptr.dtype.element_ty), mask=row_inside & k_inside)


@triton.jit
def _patch_embed_bwd_sum_kernel(
    x_ptr, sum_ptr, M, D, stride_xg, stride_xm, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """sum[group] = Σ x[group, m] over the M rows of the group, in fixed order."""
    bands = tl.cdiv(D, BLOCK_D)
    group = tl.program_id(0) // bands
    column = (tl.program_id(0) % bands * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]  # [1, BLOCK_D]
    row = tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    if WIDE:
        row = row.to(tl.int64)
    x_ptr += group.to(tl.int64) * stride_xg
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + row
        total += tl.load(x_ptr + m * stride_xm + column, mask=(m < M) & (column < D), other=0.0).to(tl.float32)
    sum_block = sum_ptr + (group.to(tl.int64) * D + column)  # [1, BLOCK_D]
    tl.store(sum_block, tl.sum(total, axis=0)[None, :].to(sum_ptr.dtype.element_ty), mask=column < D)


def _wide(*tensors) -> bool:
    """Whether an offset within one of the tensors passes 2^31."""
    shapes = [zip(t.shape, t.stride(), strict=True) for t in tensors if t is not None]
    return any(sum((size - 1) * stride for size, stride in shape) >= 1 << 31 for shape in shapes)


def _channels_last(image) -> bool:
    """Whether the channels of a pixel, and the pixels of a row, are neighbours in memory."""
    return image.shape[1] > 1 and image.stride(1) == 1 and image.stride(3) == image.shape[1]


def _aligned(image, weight) -> bool:
    """Whether patches and rows of the weight, of the tokens too, lie so that 16 bytes are moved at a time."""
    dim, channels, _, patch_width = weight.shape
    channels_last = _channels_last(image)
    runs = (patch_width * channels,) if channels_last else (patch_width, image.stride(1))
    dense = channels_last or image.stride(3) == 1
    by_image = _device.aligned(image, *runs, image.stride(0), image.stride(2))
    return dense and by_image and _device.aligned(weight, weight[0].numel(), dim)


def _constant(values) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def forward(image, weight, bias, pos_embed, prefix, pixel_scale, pixel_shift):
    batch, channels, height, width = image.shape
    dim, _, patch_height, patch_width = weight.shape
    patches_wide = width // patch_width
    patches = (height // patch_height) * patches_wide
    rows = batch * patches
    prefix_count = 0 if prefix is None else prefix.shape[0]
    tokens = torch.empty((batch, prefix_count + patches, dim), dtype=weight.dtype, device=weight.device)
    if tokens.numel() == 0:
        return tokens
    channels_last = _channels_last(image)
    if channels_last:
        weight = weight.permute(0, 2, 3, 1).contiguous()
    tile = _tuning_patches.patches(
        _device.chip(weight), weight.element_size(), rows, dim, _aligned(image, weight), image.dtype == torch.uint8
    )
    grid = (triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(dim, tile.BLOCK_N),)
    with _device.on_device_of(weight):
        _patch_embed_fwd_kernel[grid](
            image, weight, bias, pos_embed, prefix, tokens,
            rows, dim, patches, patches_wide, prefix_count, 0 if pos_embed is None else pos_embed.shape[0] - patches,
            *image.stride(), 0 if prefix is None else prefix.stride(0), 0 if pos_embed is None else pos_embed.stride(0),
            HAS_BIAS=bias is not None, HAS_POS_EMBED=pos_embed is not None, HAS_PREFIX=prefix is not None,
            PIXEL_SCALE=_constant(pixel_scale), PIXEL_SHIFT=_constant(pixel_shift), CHANNELS_LAST=channels_last,
            C=channels, P=patch_height, Q=patch_width, WIDE=_wide(image, tokens, pos_embed, prefix),
            **vars(tile),
        )  # fmt: skip
    return tokens


def backward(dy, image, weight, pixel_scale, pixel_shift, positions, prefix, image_grad):
    tokens = _sum(dy.transpose(0, 1), torch.float32)
    dbias = _sum(tokens[None, prefix:], dy.dtype)[0]
    dpos_embed = tokens[tokens.shape[0] - positions :].to(dy.dtype, copy=True) if positions else dy.new_empty(0)
    dprefix = tokens[:prefix].to(dy.dtype, copy=True)
    dpatches = dy[:, prefix:]
    dimage = _grad_image(dpatches, image, weight, pixel_scale) if image_grad else dy.new_empty(0)
    return dimage, _grad_weight(dpatches, image, weight, pixel_scale, pixel_shift), dbias, dpos_embed, dprefix


def _sum(x, dtype):
    """x (G, M, D) summed over M."""
    groups, rows, width = x.shape
    total = torch.empty((groups, width), dtype=dtype, device=x.device)
    if total.numel():
        tile = _tuning_patches.patches_sum(groups, rows, width)
        with _device.on_device_of(x):
            _patch_embed_bwd_sum_kernel[(groups * triton.cdiv(width, tile.BLOCK_D),)](
                x, total, rows, width, *x.stride()[:2], WIDE=_wide(x), **vars(tile)
            )
    return total


def _grad_weight(dpatches, image, weight, pixel_scale, pixel_shift):
    dim, channels, patch_height, patch_width = weight.shape
    batch, patches, _ = dpatches.shape
    rows, depth = batch * patches, channels * patch_height * patch_width
    if rows * weight.numel() == 0:
        return torch.zeros_like(weight)
    channels_last = _channels_last(image)
    # Not by the strides of dy: however it lies in memory, the sums are those of a contiguous one to the bit.
    tile, splits = _tuning_patches.patches_weight(
        _device.chip(weight), weight.element_size(), rows, dim, depth, _aligned(image, weight)
    )
    inner = (patch_height, patch_width, channels) if channels_last else weight.shape[1:]
    partials = torch.empty((splits, dim, *inner), dtype=torch.float32, device=weight.device)
    split_rows = triton.cdiv(triton.cdiv(rows, splits), tile.BLOCK_K) * tile.BLOCK_K
    with _device.on_device_of(weight):
        _patch_embed_bwd_weight_kernel[triton.cdiv(dim, tile.BLOCK_M) * triton.cdiv(depth, tile.BLOCK_N), splits](
            dpatches, image, partials,
            rows, dim, split_rows, *dpatches.stride()[:2], *image.stride(),
            PIXEL_SCALE=_constant(pixel_scale), PIXEL_SHIFT=_constant(pixel_shift), CHANNELS_LAST=channels_last,
            C=channels, P=patch_height, Q=patch_width, PATCHES=patches, PATCHES_WIDE=image.shape[3] // patch_width,
            WIDE=_wide(dpatches, image), **vars(tile),
        )  # fmt: skip
    dweight = _sum(partials.view(1, splits, -1), weight.dtype).view(partials.shape[1:])
    return dweight.permute(0, 3, 1, 2).contiguous() if channels_last else dweight


def _grad_image(dpatches, image, weight, pixel_scale):
    dim, channels, patch_height, patch_width = weight.shape
    batch, patches, _ = dpatches.shape
    rows, depth = batch * patches, channels * patch_height * patch_width
    dimage = torch.empty(tuple(image.shape), dtype=dpatches.dtype, device=image.device)
    if dimage.numel() == 0:
        return dimage
    tile = _tuning_patches.patches(_device.chip(weight), weight.element_size(), rows, depth, _aligned(dimage, weight))
    with _device.on_device_of(weight):
        _patch_embed_bwd_image_kernel[(triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(depth, tile.BLOCK_N),)](
            dpatches, weight, dimage,
            rows, dim, patches, image.shape[3] // patch_width, *dpatches.stride()[:2], *dimage.stride(),
            PIXEL_SCALE=_constant(pixel_scale), C=channels, P=patch_height, Q=patch_width,
            WIDE=_wide(dpatches, dimage), **vars(tile),
        )  # fmt: skip
    return dimage
