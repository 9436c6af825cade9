#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace fastvit::cuda {

constexpr int kMaxChannels = 16;  // of images that are normalised: their factors travel with the launch

// image (B, C, height, width) of the patches' dtype or of bytes, any strides, to a matrix with a contiguous row of
// C P Q pixels for each of its patches, where pixels are pixel * scale + shift if they are normalised.
struct Patches {
  const void* image = nullptr;
  void* patches = nullptr;
  int64_t strides[4] = {};
  int64_t batch = 0;
  int channels = 0, height = 0, width = 0, patch_height = 1, patch_width = 1;
  bool bytes = false, normalised = false;
  bool vectors = false;  // whether pixels can be read as they are written; the launch decides
  float scale[kMaxChannels] = {}, shift[kMaxChannels] = {};
};

// y (B, prefixes + N, D): the prefix rows, and behind them each image's N rows of products. Positions, where there are
// any, are added. Strides are of rows, in elements; products and y are contiguous.
struct PatchTokens {
  const void* products = nullptr;
  const void* prefix = nullptr;
  const void* positions = nullptr;         // of the patches
  const void* prefix_positions = nullptr;  // of the prefix rows
  void* y = nullptr;
  int64_t prefix_stride = 0, positions_stride = 0, batch = 0, prefixes = 0, tokens = 0, width = 0;
};

// Launch on a cudaStream_t of the current device; answer null or CUDA's error message.
const char* launch_patches(const Patches& args, Dtype dtype, void* stream);
const char* launch_patch_tokens(const PatchTokens& args, Dtype dtype, void* stream);

}  // namespace fastvit::cuda
