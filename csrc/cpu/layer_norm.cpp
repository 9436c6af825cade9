#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"
#include "cpu/kernels.h"

#define FASTVIT_KERNELS "cpu/layer_norm_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {

template <class T, class Y>
void layer_norm_rows(const LayerNormArgs<T, Y>& args, int64_t begin, int64_t end) {
  FASTVIT_SELECT(layer_norm_rows<T, Y>)(args, begin, end);
}

template void layer_norm_rows(const LayerNormArgs<float>&, int64_t, int64_t);
template void layer_norm_rows(const LayerNormArgs<double>&, int64_t, int64_t);
template void layer_norm_rows(const LayerNormArgs<bfloat16>&, int64_t, int64_t);
template void layer_norm_rows(const LayerNormArgs<float16>&, int64_t, int64_t);
template void layer_norm_rows(const LayerNormArgs<float, bfloat16>&, int64_t, int64_t);

namespace {

constexpr const char* kOp = "layer_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& residual,
                                                      const OptionalTensor& layer_scale, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps, bool to_bfloat16,
                                                      const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(!sample_scale, kOp, ": the CPU kernels take no sample_scale");
  FASTVIT_CHECK(x.dim() == 2, kOp, ": x must have shape (M, D)");
  FASTVIT_CHECK(residual || !layer_scale, kOp, ": layer_scale needs a residual");
  const int64_t m = x.size(0), width = x.size(1);
  FASTVIT_CHECK(!to_bfloat16 || x.scalar_type() == ScalarType::Float, kOp, ": only float32 rows become bfloat16");
  Tensor y = empty(x, {m, width}, to_bfloat16 ? ScalarType::BFloat16 : x.scalar_type());
  Tensor z = residual ? empty(x, {m, width}) : empty(x, {0});
  Tensor mean = empty(x, {m}, statistics_dtype(x));
  Tensor rstd = empty(x, {m}, statistics_dtype(x));
  const auto run = [&](auto tag, auto y_tag) {
    using T = decltype(tag);
    using Y = decltype(y_tag);
    using A = accumulator_t<T>;
    const Rows<T> x_rows = rows<T>(x, m, width, x, kOp, "x");
    const Rows<T> residual_rows = rows<T>(residual, m, width, x, kOp, "residual");
    LayerNormArgs<T, Y> args;
    args.x = x_rows.data;
    args.x_stride = x_rows.stride;
    args.residual = residual_rows.data;
    args.residual_stride = residual_rows.stride;
    args.layer_scale = vector<T>(layer_scale, width, x, kOp, "layer_scale");
    args.weight = vector<T>(weight, width, x, kOp, "weight");
    args.bias = vector<T>(bias, width, x, kOp, "bias");
    args.width = width;
    args.eps = eps;
    args.y = data<Y>(y);
    args.y_stride = width;
    args.z = data<T>(z);
    args.mean = data<A>(mean);
    args.rstd = data<A>(rstd);
    const int64_t grain = 16384 / (width + 1) + 1;
    parallel_for(m, grain, [&](int64_t begin, int64_t end) { layer_norm_rows(args, begin, end); });
  };
  if (to_bfloat16)
    run(float{}, bfloat16{});
  else
    dispatch(x, kOp, [&](auto tag) { run(tag, tag); });
  return {y, z, mean, rstd};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("layer_norm", TORCH_BOX(&fastvit::layer_norm)); }
