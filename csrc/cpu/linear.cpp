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
                                  const std::string& activation, bool keep_preact, const OptionalTensor& packed,
                                  const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(!sample_scale, kOp, ": the CPU kernels take no sample_scale");
  FASTVIT_CHECK(x.dim() == 2 && weight.dim() == 2, kOp, ": x must have shape (M, K) and weight (N, K)");
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  // Autocast: bfloat16 rows meet float32 parameters, and a float32 residual stream stays one.
  const bool autocast = is_autocast(x, weight), wide = autocast && residual;
  Tensor y = empty(x, {m, n}, (wide ? weight : x).scalar_type());
  Tensor preact = keep_preact ? empty(x, {m, n}) : empty(x, {0});
  const Activation parsed = parse_activation(activation, kOp);
  const auto run = [&](auto tag, auto parameter_tag, auto y_tag) {
    using T = decltype(tag);
    using V = decltype(parameter_tag);
    using Y = decltype(y_tag);
    const Rows<T> x_rows = rows<T>(x, m, k, x, kOp, "x");
    const Rows<V> weight_rows = rows<V>(weight, n, k, weight, kOp, "weight");
    const Rows<Y> residual_rows = rows<Y>(residual, m, n, weight, kOp, "residual");
    GemmArgs<T, V, Y> args;
    args.x = x_rows.data;
    args.x_stride = x_rows.stride;
    args.weight = weight_rows.data;
    args.weight_stride = weight_rows.stride;
    args.panels = panels_of<T>(packed, n, k, kOp, "packed");
    args.m = m;
    args.n = n;
    args.k = k;
    args.bias = vector<V>(bias, n, weight, kOp, "bias");
    args.layer_scale = vector<V>(layer_scale, n, weight, kOp, "layer_scale");
    args.residual = residual_rows.data;
    args.residual_stride = residual_rows.stride;
    args.activation = parsed;
    args.preact = keep_preact ? data<Y>(preact) : nullptr;
    args.preact_stride = n;
    args.y = data<Y>(y);
    args.y_stride = n;
    gemm(args);
  };
  FASTVIT_CHECK(!(wide && keep_preact), kOp, ": with float32 parameters and a residual no preact is kept");
  if (wide)
    run(bfloat16{}, float{}, float{});
  else if (autocast)
    run(bfloat16{}, float{}, bfloat16{});
  else
    dispatch(x, kOp, [&](auto tag) {
      check_like(weight, x, x.scalar_type(), kOp, "weight");
      run(tag, tag, tag);
    });
  return {y, preact};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("linear", TORCH_BOX(&fastvit::linear)); }
