#pragma once

// What kernels without arithmetic to speak of share: how a grid covers rows of vectors, and how a launch chooses both
// the type and the vectors' length.

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/dtype.h"
#include "cuda/launch.cuh"

namespace fastvit::cuda {

constexpr int kRowWarps = 8;

// A block has kRowWarps rows, a warp each, and 32 vectors of columns, and goes on `row_step` rows further down: what
// belongs to columns stays in registers.
template <int VEC>
struct RowTile {
  int64_t row, column, row_step;

  __device__ explicit RowTile(int64_t width) {
    const auto column_tiles = static_cast<unsigned>((width + 32 * VEC - 1) / (32 * VEC));
    row = int64_t{blockIdx.x / column_tiles} * kRowWarps + threadIdx.x / 32;
    column = (int64_t{blockIdx.x % column_tiles} * 32 + threadIdx.x % 32) * VEC;
    row_step = int64_t{gridDim.x / column_tiles} * kRowWarps;
  }
};

// Two rounds of what a device has room for: more would only read again what belongs to columns.
inline int64_t enough_blocks() { return int64_t{16} * device_attribute(cudaDevAttrMultiProcessorCount); }

template <int VEC>
int64_t row_tile_blocks(int64_t rows, int64_t width) {
  const int64_t column_tiles = (width + 32 * VEC - 1) / (32 * VEC);
  const int64_t wanted = std::max<int64_t>(enough_blocks() / column_tiles, 1);
  return column_tiles * std::min((rows + kRowWarps - 1) / kRowWarps, wanted);
}

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
bool is_aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  for (const int64_t stride : strides) bits |= static_cast<uintptr_t>(stride) * sizeof(T);
  return bits % 16 == 0;
}

// f(value of the type that holds the dtype).
template <class F>
const char* with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::float32) return f(float{});
  if (dtype == Dtype::float16) return f(__half{});
  return f(__nv_bfloat16{});
}

}  // namespace fastvit::cuda
