#pragma once

// Tensors to the arguments of CUDA kernels.

#include "common/check.h"
#include "cuda/dtype.h"
#include "cuda/stream.h"

namespace fastvit::cuda {

inline Dtype dtype_of(const Tensor& t, const char* op, const char* name, bool float32 = true) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      if (float32) return Dtype::float32;
      break;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      break;
  }
  FASTVIT_CHECK(false, op, ": on CUDA ", name, " must be ", float32 ? "float32, " : "", "float16 or bfloat16, got ",
                torch::headeronly::toString(t.scalar_type()));
  return Dtype::float32;
}

}  // namespace fastvit::cuda
