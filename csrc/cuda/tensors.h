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

// One factor per sample of equally many rows, for any kernel's arguments.
template <class Args>
void set_sample_scale(Args& args, const OptionalTensor& sample_scale, int64_t rows, const Tensor& like,
                      const char* op) {
  if (!sample_scale) return;
  const int64_t samples = sample_scale->numel();
  args.sample_scale = vector<void>(sample_scale, samples, like, op, "sample_scale");
  FASTVIT_CHECK(samples ? rows % samples == 0 : rows == 0, op, ": ", rows, " rows are not ", samples,
                " samples of equally many");
  args.sample_rows = samples ? rows / samples : 1;
}

}  // namespace fastvit::cuda
