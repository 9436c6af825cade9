#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace fastvit::cuda {

// With n = (z - mean) rstd and h = dy weight: d = rstd (h - E[h] - n E[h n]) + dz and dx = d sample_scale layer_scale;
// dweight = Σ dy n, dbias = Σ dy, dlayer_scale = Σ d sample_scale x. Strides are of rows, in elements; d and dx are
// contiguous, dx is null where nothing scales x, and x where there is no layer_scale.
struct LayerNormBackward {
  const void* dy = nullptr;
  const void* dz = nullptr;
  const void* z = nullptr;
  const void* x = nullptr;
  const void* weight = nullptr;
  const void* layer_scale = nullptr;
  const void* sample_scale = nullptr;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  void* d = nullptr;
  void* dx = nullptr;
  void* dweight = nullptr;
  void* dbias = nullptr;
  void* dlayer_scale = nullptr;
  float* partial = nullptr;  // (blocks, 2 or with layer_scale 3, width): the parameters' gradients by a block's rows
  int64_t dy_stride = 0, dz_stride = 0, z_stride = 0, x_stride = 0, rows = 0, width = 0, sample_rows = 1;
  int blocks = 0;
  bool sums_in_shared = false;
};

// Among how many blocks the rows are shared on the current device. Pointers must be there, `partial` and `blocks` not.
int layer_norm_backward_blocks(const LayerNormBackward& args, Dtype dtype);

// Launches on a cudaStream_t of the current device; answers null or CUDA's error message.
const char* launch_layer_norm_backward(const LayerNormBackward& args, Dtype dtype, void* stream);

}  // namespace fastvit::cuda
