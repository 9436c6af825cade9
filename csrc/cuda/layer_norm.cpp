#include "cuda/layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/tensors.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "layer_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, const OptionalTensor& residual,
                                                           const OptionalTensor& layer_scale,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps, bool to_bfloat16,
                                                           const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(!to_bfloat16, kOp, ": the CUDA kernels write x's dtype");
  FASTVIT_CHECK(x.dim() == 2, kOp, ": x must have shape (M, D)");
  FASTVIT_CHECK(residual || !(layer_scale || sample_scale), kOp, ": layer_scale and sample_scale need a residual");
  const cuda::Dtype dtype = cuda::dtype_of(x, kOp, "x");
  const cuda::Stream stream(x, kOp);
  const int64_t m = x.size(0), width = x.size(1);
  Tensor y = empty(x, {m, width});
  Tensor z = residual ? empty(x, {m, width}) : empty(x, {0});
  Tensor mean = empty(x, {m}, ScalarType::Float);
  Tensor rstd = empty(x, {m}, ScalarType::Float);
  const Rows<void> x_rows = rows<void>(x, m, width, x, kOp, "x");
  const Rows<void> residual_rows = rows<void>(residual, m, width, x, kOp, "residual");
  cuda::LayerNorm args;
  args.x = x_rows.data;
  args.x_stride = x_rows.stride;
  args.residual = residual_rows.data;
  args.residual_stride = residual_rows.stride;
  args.layer_scale = vector<void>(layer_scale, width, x, kOp, "layer_scale");
  set_sample_scale(args, sample_scale, m, x, kOp);
  args.weight = vector<void>(weight, width, x, kOp, "weight");
  args.bias = vector<void>(bias, width, x, kOp, "bias");
  args.y = y.mutable_data_ptr();
  args.z = z.mutable_data_ptr();
  args.mean = data<float>(mean);
  args.rstd = data<float>(rstd);
  args.rows = m;
  args.width = width;
  args.eps = static_cast<float>(eps);
  stream.check(cuda::launch_layer_norm(args, dtype, stream));
  return {y, z, mean, rstd};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("layer_norm", TORCH_BOX(&fastvit::layer_norm_cuda));
}
