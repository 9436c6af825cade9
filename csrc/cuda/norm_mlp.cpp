#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cuda/layer_norm.h"
#include "cuda/product.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "norm_mlp";

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_mlp_cuda(
    const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& layer_scale, double eps, const std::string& activation, bool residual, bool keep,
    const OptionalTensor& fc1_packed, const OptionalTensor& fc2_packed, const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(!fc1_packed && !fc2_packed, kOp, ": packed weights are for the CPU kernels");
  FASTVIT_CHECK(x.dim() == 2 && fc1_weight.dim() == 2 && fc2_weight.dim() == 2, kOp,
                ": x must have shape (M, D), fc1_weight (F, D) and fc2_weight (O, F)");
  const int64_t m = x.size(0), width = x.size(1);
  const cuda::Dtype dtype = cuda::dtype_of(x, kOp, "x");
  const Activation parsed = parse_activation(activation, kOp);
  const cuda::Stream stream(x, kOp);
  Tensor mean = empty(x, {m}, ScalarType::Float);
  Tensor rstd = empty(x, {m}, ScalarType::Float);
  Tensor preact = empty(x, {0});
  Tensor y = empty(x, {m, width});  // normalised rows, hidden activations, then the result: each frees the one before
  cuda::LayerNorm norm{};
  const Rows<void> x_rows = rows<void>(x, m, width, x, kOp, "x");
  norm.x = x_rows.data;
  norm.x_stride = x_rows.stride;
  norm.weight = vector<void>(norm_weight, width, x, kOp, "norm_weight");
  norm.bias = vector<void>(norm_bias, width, x, kOp, "norm_bias");
  norm.y = y.mutable_data_ptr();
  norm.mean = data<float>(mean);
  norm.rstd = data<float>(rstd);
  norm.rows = m;
  norm.width = width;
  norm.eps = static_cast<float>(eps);
  stream.check(cuda::launch_layer_norm(norm, dtype, stream));
  y = cuda::product(y, fc1_weight, fc1_bias);
  if (keep) preact = y;
  y = cuda::finish(y, parsed, {}, keep, dtype, stream, kOp);
  y = cuda::product(y, fc2_weight, fc2_bias);
  const OptionalTensor added = residual ? OptionalTensor(x) : std::nullopt;
  y = cuda::finish(y, Activation::none, {layer_scale, sample_scale, added}, false, dtype, stream, kOp);
  if (!keep) return {y, empty(x, {0}), empty(x, {0}), preact};
  return {y, mean, rstd, preact};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("norm_mlp", TORCH_BOX(&fastvit::norm_mlp_cuda));
}
