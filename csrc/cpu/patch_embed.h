#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastvit {

// image (B, C, height, width) of Pixel = T or uint8, any strides, cut into (rows x columns) patches of P x Q pixels.
template <class T>
struct PatchArgs {
  const void* image = nullptr;
  bool bytes = false;
  int64_t strides[4] = {};
  int64_t channels = 0, patch_height = 0, patch_width = 0, rows = 0, columns = 0;
  const float* scale = nullptr;
  const float* shift = nullptr;
  T* patches = nullptr;
};

template <class T>
struct PrefixArgs {
  const T* prefix = nullptr;
  const T* positions = nullptr;
  int64_t prefix_stride = 0, positions_stride = 0;
  int64_t batch = 0, count = 0, tokens = 0, width = 0;
  T* y = nullptr;
};

}  // namespace fastvit
