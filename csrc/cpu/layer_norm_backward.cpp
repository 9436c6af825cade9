#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "cpu/parallel.h"

namespace fastvit {

// d = rstd (h - E[h] - n E[h n]) + dz with h = dy weight and n = (z - mean) rstd; dx = d layer_scale.
// Under autocast dy comes out of a product and is narrower (G) than the rows.
template <class T, class G = T>
struct LayerNormBackwardArgs {
  using A = accumulator_t<T>;
  const G* dy = nullptr;
  int64_t dy_stride = 0;
  const T* dz = nullptr;
  int64_t dz_stride = 0;
  const T* z = nullptr;
  int64_t z_stride = 0;
  const A* mean = nullptr;
  const A* rstd = nullptr;
  const T* weight = nullptr;
  const T* x = nullptr;
  int64_t x_stride = 0;
  const T* layer_scale = nullptr;
  int64_t width = 0;
  T* d = nullptr;
  T* dx = nullptr;
};

}  // namespace fastvit

#define FASTVIT_KERNELS "cpu/layer_norm_backward_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "layer_norm";
// Rows are summed in as many parts as this whatever the number of threads, so that the bits do not depend on it.
constexpr int64_t kParts = 32;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const OptionalTensor& dz,
                                                                       const Tensor& z, const Tensor& mean,
                                                                       const Tensor& rstd, const OptionalTensor& weight,
                                                                       const OptionalTensor& x,
                                                                       const OptionalTensor& layer_scale,
                                                                       const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(!sample_scale, kOp, ": the CPU kernels take no sample_scale");
  FASTVIT_CHECK(z.dim() == 2, kOp, ": z must have shape (M, D)");
  FASTVIT_CHECK(!layer_scale || x, kOp, ": layer_scale needs x");
  const int64_t m = z.size(0), width = z.size(1);
  Tensor d = empty(z, {m, width});
  Tensor dx = layer_scale ? empty(z, {m, width}) : empty(z, {0});
  Tensor dlayer_scale = layer_scale ? empty(z, {width}) : empty(z, {0});
  Tensor dweight = empty(z, {width}), dbias = empty(z, {width});
  const auto run = [&](auto tag, auto dy_tag) {
    using T = decltype(tag);
    using G = decltype(dy_tag);
    using A = accumulator_t<T>;
    const Rows<G> dy_rows = rows<G>(dy, m, width, dy, kOp, "dy");
    const Rows<T> dz_rows = rows<T>(dz, m, width, z, kOp, "dz");
    const Rows<T> z_rows = rows<T>(z, m, width, z, kOp, "z");
    const Rows<T> x_rows = layer_scale ? rows<T>(x, m, width, z, kOp, "x") : Rows<T>{};
    LayerNormBackwardArgs<T, G> args;
    args.dy = dy_rows.data;
    args.dy_stride = dy_rows.stride;
    args.dz = dz_rows.data;
    args.dz_stride = dz_rows.stride;
    args.z = z_rows.data;
    args.z_stride = z_rows.stride;
    args.mean = vector<A>(OptionalTensor(mean), m, z, statistics_dtype(z), kOp, "mean");
    args.rstd = vector<A>(OptionalTensor(rstd), m, z, statistics_dtype(z), kOp, "rstd");
    args.weight = vector<T>(weight, width, z, kOp, "weight");
    args.x = x_rows.data;
    args.x_stride = x_rows.stride;
    args.layer_scale = vector<T>(layer_scale, width, z, kOp, "layer_scale");
    args.width = width;
    args.d = data<T>(d);
    args.dx = data<T>(dx);
    const int64_t parts = std::min(kParts, std::max<int64_t>(m, 1));
    const Scratch scratch(parts * 3 * width * sizeof(A));
    A* const sums = scratch.as<A>();
    std::fill(sums, sums + parts * 3 * width, A(0));
    const auto rows_of = FASTVIT_SELECT(layer_norm_gradients<T, G>);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) rows_of(args, m * p / parts, m * (p + 1) / parts, sums + p * 3 * width);
    });
    for (int64_t p = 1; p < parts; p++)
      for (int64_t i = 0; i < 3 * width; i++) sums[i] += sums[p * 3 * width + i];
    const auto round = FASTVIT_SELECT(round_sums<T>);
    round(sums, width, data<T>(dweight));
    round(sums + width, width, data<T>(dbias));
    if (layer_scale) round(sums + 2 * width, width, data<T>(dlayer_scale));
  };
  if (is_autocast(dy, z))
    run(float{}, bfloat16{});
  else
    dispatch(z, kOp, [&](auto tag) {
      check_like(dy, z, z.scalar_type(), kOp, "dy");
      run(tag, tag);
    });
  return {d, dx, dlayer_scale, dweight, dbias};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&fastvit::layer_norm_backward));
}
