#include "cpu/norm_mlp.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "common/check.h"
#include "cpu/packed.h"

#define FASTVIT_KERNELS "cpu/norm_mlp_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "norm_mlp";

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_mlp_op(
    const Tensor& x, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& layer_scale, double eps, const std::string& activation, bool residual, bool keep,
    const OptionalTensor& fc1_packed, const OptionalTensor& fc2_packed, const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(!sample_scale, kOp, ": the CPU kernels take no sample_scale");
  FASTVIT_CHECK(x.dim() == 2 && fc1_weight.dim() == 2 && fc2_weight.dim() == 2, kOp,
                ": x must have shape (M, D), fc1_weight (F, D) and fc2_weight (O, F)");
  const int64_t m = x.size(0), width = x.size(1), hidden = fc1_weight.size(0), out = fc2_weight.size(0);
  FASTVIT_CHECK(!residual || out == width, kOp, ": a residual needs as many outputs as inputs");
  const Activation parsed = parse_activation(activation, kOp);
  Tensor y = empty(x, {m, out});
  Tensor mean = keep ? empty(x, {m}, statistics_dtype(x)) : empty(x, {0});
  Tensor rstd = keep ? empty(x, {m}, statistics_dtype(x)) : empty(x, {0});
  Tensor preact = keep ? empty(x, {m, hidden}) : empty(x, {0});
  dispatch(x, kOp, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    const Rows<T> x_rows = rows<T>(x, m, width, x, kOp, "x");
    const Rows<T> fc1_rows = rows<T>(fc1_weight, hidden, width, x, kOp, "fc1_weight");
    const Rows<T> fc2_rows = rows<T>(fc2_weight, out, hidden, x, kOp, "fc2_weight");
    NormMlpArgs<T> args;
    auto& [norm, fc1, fc2] = args;
    norm.x = x_rows.data;
    norm.x_stride = x_rows.stride;
    norm.weight = vector<T>(norm_weight, width, x, kOp, "norm_weight");
    norm.bias = vector<T>(norm_bias, width, x, kOp, "norm_bias");
    norm.width = width;
    norm.eps = eps;
    fc1.m = m;
    fc1.weight = fc1_rows.data;
    fc1.weight_stride = fc1_rows.stride;
    fc1.panels = panels_of<T>(fc1_packed, hidden, width, kOp, "fc1_packed");
    fc1.n = hidden;
    fc1.k = width;
    fc1.bias = vector<T>(fc1_bias, hidden, x, kOp, "fc1_bias");
    fc1.activation = parsed;
    fc2.weight = fc2_rows.data;
    fc2.weight_stride = fc2_rows.stride;
    fc2.panels = panels_of<T>(fc2_packed, out, hidden, kOp, "fc2_packed");
    fc2.n = out;
    fc2.k = hidden;
    fc2.bias = vector<T>(fc2_bias, out, x, kOp, "fc2_bias");
    fc2.layer_scale = vector<T>(layer_scale, out, x, kOp, "layer_scale");
    fc2.residual = residual ? x_rows.data : nullptr;
    fc2.residual_stride = x_rows.stride;
    fc2.y = data<T>(y);
    fc2.y_stride = out;
    if (keep) {
      norm.mean = data<A>(mean);
      norm.rstd = data<A>(rstd);
      fc1.preact = data<T>(preact);
      fc1.preact_stride = hidden;
    }
    FASTVIT_SELECT(norm_mlp<T>)(args);
  });
  return {y, mean, rstd, preact};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("norm_mlp", TORCH_BOX(&fastvit::norm_mlp_op)); }
