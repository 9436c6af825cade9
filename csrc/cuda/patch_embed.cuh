#pragma once

#include "cuda/elementwise.cuh"
#include "cuda/patch_embed.h"

namespace fastvit::cuda {

// A block per row of pixels of an image, which its threads walk along channel by channel; VEC divides the patch width.
template <class T, class Pixel, int VEC>
__global__ void patches_kernel(const __grid_constant__ Patches g) {
  const unsigned units = g.width / VEC, columns = g.width / g.patch_width, patch = g.patch_height * g.patch_width;
  const int64_t depth = int64_t{g.channels} * patch;
  for (int64_t line = blockIdx.x; line < g.batch * g.height; line += gridDim.x) {
    const int64_t image = line / g.height;
    const int y = static_cast<int>(line - image * g.height), p = y % g.patch_height;
    const Pixel* source = static_cast<const Pixel*>(g.image) + image * g.strides[0] + y * g.strides[2];
    // The first patch that the row of pixels crosses; all patches above are whole.
    T* target = static_cast<T*>(g.patches) + (line - p) / g.patch_height * columns * depth + p * g.patch_width;
    for (unsigned i = threadIdx.x; i < g.channels * units; i += blockDim.x) {
      const unsigned channel = i / units, x = (i - channel * units) * VEC, column = x / g.patch_width;
      const Pixel* pixels = source + channel * g.strides[1] + x * g.strides[3];
      float v[VEC];
      if (g.vectors) {
        load<VEC>(pixels, v);
      } else {
#pragma unroll
        for (int k = 0; k < VEC; k++) v[k] = to_float(pixels[k * g.strides[3]]);
      }
      if (g.normalised) {
#pragma unroll
        for (int k = 0; k < VEC; k++) v[k] = v[k] * g.scale[channel] + g.shift[channel];
      }
      store<VEC>(target + column * depth + int64_t{channel} * patch + (x - column * g.patch_width), v);
    }
  }
}

// What is added to a token stays in registers from image to image.
template <class T, int VEC>
__global__ void __launch_bounds__(kRowWarps * 32)
    patch_tokens_kernel(const __grid_constant__ PatchTokens g, unsigned token_blocks) {
  const auto column_tiles = static_cast<unsigned>((g.width + 32 * VEC - 1) / (32 * VEC));
  const unsigned at = blockIdx.x % token_blocks;
  const int64_t token = int64_t{at / column_tiles} * kRowWarps + threadIdx.x / 32, patch = token - g.prefixes;
  const int64_t column = (int64_t{at % column_tiles} * 32 + threadIdx.x % 32) * VEC;
  if (token >= g.tokens || column >= g.width) return;
  const bool is_patch = patch >= 0;
  const void* table = is_patch ? g.positions : g.prefix_positions;
  float position[VEC], v[VEC];
  if (table)
    load<VEC>(static_cast<const T*>(table) + (is_patch ? patch : token) * g.positions_stride + column, position);
  if (!is_patch) load<VEC>(static_cast<const T*>(g.prefix) + token * g.prefix_stride + column, v);
  for (int64_t image = blockIdx.x / token_blocks; image < g.batch; image += gridDim.x / token_blocks) {
    if (is_patch)
      load<VEC>(static_cast<const T*>(g.products) + (image * (g.tokens - g.prefixes) + patch) * g.width + column, v);
    float sum[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) sum[i] = table ? v[i] + position[i] : v[i];
    store<VEC>(static_cast<T*>(g.y) + (image * g.tokens + token) * g.width + column, sum);
  }
}

}  // namespace fastvit::cuda
