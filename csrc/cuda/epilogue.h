#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cuda/dtype.h"

namespace fastvit::cuda {

// y = residual + sample_scale * layer_scale * activation(h) over contiguous rows of a product h, of which sample_rows
// belong to a sample. In float32, rounded once. What is null is left out; y may be h.
struct Epilogue {
  const void* h = nullptr;
  const void* layer_scale = nullptr;
  const void* sample_scale = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
  int64_t residual_stride = 0, rows = 0, width = 0, sample_rows = 1;
  Activation activation = Activation::none;
};

// dpreact = dy * activation'(preact), contiguous but for the rows of dy.
struct ActivationBackward {
  const void* dy = nullptr;
  const void* preact = nullptr;
  void* dpreact = nullptr;
  int64_t dy_stride = 0, rows = 0, width = 0;
  Activation activation = Activation::none;
};

// Launch on a cudaStream_t of the current device; answer null or CUDA's error message.
const char* launch_epilogue(const Epilogue& args, Dtype dtype, void* stream);
const char* launch_activation_backward(const ActivationBackward& args, Dtype dtype, void* stream);

}  // namespace fastvit::cuda
