#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "linear";

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& layer_scale, const OptionalTensor& residual,
                                  const std::string& activation, bool keep_preact, const OptionalTensor& packed) {
  FASTVIT_CHECK(x.dim() == 2 && weight.dim() == 2, kOp, ": x must have shape (M, K) and weight (N, K)");
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  Tensor y = empty(x, {m, n});
  Tensor preact = keep_preact ? empty(x, {m, n}) : empty(x, {0});
  const Activation parsed = parse_activation(activation, kOp);
  dispatch(x, kOp, [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> x_rows = rows<T>(x, m, k, x, kOp, "x");
    const Rows<T> weight_rows = rows<T>(weight, n, k, x, kOp, "weight");
    const Rows<T> residual_rows = rows<T>(residual, m, n, x, kOp, "residual");
    GemmArgs<T> args;
    args.x = x_rows.data;
    args.x_stride = x_rows.stride;
    args.weight = weight_rows.data;
    args.weight_stride = weight_rows.stride;
    args.panels = panels_of<T>(packed, n, k, kOp, "packed");
    args.m = m;
    args.n = n;
    args.k = k;
    args.bias = vector<T>(bias, n, x, kOp, "bias");
    args.layer_scale = vector<T>(layer_scale, n, x, kOp, "layer_scale");
    args.residual = residual_rows.data;
    args.residual_stride = residual_rows.stride;
    args.activation = parsed;
    args.preact = keep_preact ? data<T>(preact) : nullptr;
    args.preact_stride = n;
    args.y = data<T>(y);
    args.y_stride = n;
    gemm(args);
  });
  return {y, preact};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("linear", TORCH_BOX(&fastvit::linear)); }
