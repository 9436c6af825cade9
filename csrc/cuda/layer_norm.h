#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace fastvit::cuda {

// y = LN(z) with z = x, or z = residual + layer_scale * x rounded to the dtype and written to z. Strides are of rows,
// in elements; y and z are contiguous.
struct LayerNorm {
  const void* x;
  const void* residual;
  const void* layer_scale;
  const void* weight;
  const void* bias;
  void* y;
  void* z;
  float* mean;
  float* rstd;
  int64_t x_stride, residual_stride, rows, width;
  float eps;
};

// Launches on a cudaStream_t of the current device; answers null or CUDA's error message.
const char* launch_layer_norm(const LayerNorm& args, Dtype dtype, void* stream);

}  // namespace fastvit::cuda
