#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace fastvit::cuda {

// y = LN(z) with z = x, or z = residual + sample_scale * layer_scale * x rounded to the dtype and written to z. A
// sample is sample_rows rows. Strides are of rows, in elements; y and z are contiguous.
struct LayerNorm {
  const void* x = nullptr;
  const void* residual = nullptr;
  const void* layer_scale = nullptr;
  const void* sample_scale = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;
  void* z = nullptr;
  float* mean = nullptr;  // of each row, as rstd, or null: they are for the backward
  float* rstd = nullptr;
  int64_t x_stride = 0, residual_stride = 0, rows = 0, width = 0, sample_rows = 1;
  float eps = 0;
};

// Launches on a cudaStream_t of the current device; answers null or CUDA's error message.
const char* launch_layer_norm(const LayerNorm& args, Dtype dtype, void* stream);

}  // namespace fastvit::cuda
