#pragma once

// How a grid covers rows of vectors in kernels without arithmetic to speak of.

#include <algorithm>

#include "cuda/device.cuh"
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

}  // namespace fastvit::cuda
