#pragma once

// Products by PyTorch's library, and what follows them.

#include <array>

#include "cuda/epilogue.h"
#include "cuda/tensors.h"

namespace fastvit::cuda {

// x Wᵀ + b: the library adds the bias in float32, before it rounds.
inline Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Factors {
  OptionalTensor layer_scale = std::nullopt, sample_scale = std::nullopt, residual = std::nullopt;
};

// residual + sample_scale * layer_scale * activation(h) of a product h, in h's memory unless that is kept.
inline Tensor finish(const Tensor& h, Activation activation, const Factors& factors, bool keep, Dtype dtype,
                     const Stream& stream, const char* op) {
  const auto& [layer_scale, sample_scale, residual] = factors;
  if (!keep && activation == Activation::none && !layer_scale && !sample_scale && !residual) return h;
  Epilogue args;
  args.rows = h.size(0);
  args.width = h.size(1);
  args.activation = activation;
  args.layer_scale = vector<void>(layer_scale, args.width, h, op, "layer_scale");
  const Rows<void> residual_rows = rows<void>(residual, args.rows, args.width, h, op, "residual");
  args.residual = residual_rows.data;
  args.residual_stride = residual_rows.stride;
  set_sample_scale(args, sample_scale, args.rows, h, op);
  Tensor y = keep ? empty(h, {args.rows, args.width}) : h;
  args.h = h.const_data_ptr();
  args.y = y.mutable_data_ptr();
  stream.check(launch_epilogue(args, dtype, stream));
  return y;
}

}  // namespace fastvit::cuda
