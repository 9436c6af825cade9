#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cuda/product.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "linear";

std::tuple<Tensor, Tensor> linear_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& layer_scale, const OptionalTensor& residual,
                                       const std::string& activation, bool keep_preact, const OptionalTensor& packed,
                                       const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(!packed, kOp, ": packed weights are for the CPU kernels");
  FASTVIT_CHECK(x.dim() == 2 && weight.dim() == 2, kOp, ": x must have shape (M, K) and weight (N, K)");
  const cuda::Dtype dtype = cuda::dtype_of(x, kOp, "x");
  const Activation parsed = parse_activation(activation, kOp);
  const cuda::Stream stream(x, kOp);
  const Tensor preact = cuda::product(x, weight, bias);
  Tensor y = cuda::finish(preact, parsed, {layer_scale, sample_scale, residual}, keep_preact, dtype, stream, kOp);
  return {y, keep_preact ? preact : empty(x, {0})};
}

Tensor activation_backward_cuda(const Tensor& dy, const Tensor& preact, const std::string& activation) {
  constexpr const char* kName = "activation_backward";
  FASTVIT_CHECK(dy.dim() == 2, kName, ": dy must have shape (M, N)");
  const cuda::Dtype dtype = cuda::dtype_of(dy, kName, "dy");
  const cuda::Stream stream(dy, kName);
  cuda::ActivationBackward args;
  args.rows = dy.size(0);
  args.width = dy.size(1);
  args.activation = parse_activation(activation, kName);
  const Rows<void> dy_rows = rows<void>(dy, args.rows, args.width, dy, kName, "dy");
  args.dy = dy_rows.data;
  args.dy_stride = dy_rows.stride;
  args.preact = rows<void>(preact, args.rows, args.width, dy, kName, "preact").data;
  FASTVIT_CHECK(preact.is_contiguous(), kName, ": preact must be contiguous");
  Tensor dpreact = empty(dy, {args.rows, args.width});
  args.dpreact = dpreact.mutable_data_ptr();
  stream.check(cuda::launch_activation_backward(args, dtype, stream));
  return dpreact;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("linear", TORCH_BOX(&fastvit::linear_cuda));
  m.impl("activation_backward", TORCH_BOX(&fastvit::activation_backward_cuda));
}
