#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "common/check.h"
#include "cpu/kernels.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "matmul";

// Whether the rows of a matrix are contiguous, or else its columns; the stride of the other dimension.
bool by_columns(const Tensor& t, const char* name, int64_t& stride) {
  FASTVIT_CHECK(t.dim() == 2, kOp, ": ", name, " must be a matrix");
  const bool rows = t.size(1) <= 1 || t.stride(1) == 1;
  FASTVIT_CHECK(rows || t.size(0) <= 1 || t.stride(0) == 1, kOp, ": ", name, " must have contiguous rows or columns");
  stride = rows ? t.stride(0) : t.stride(1);
  return !rows;
}

// a b, sums in float32 (float64 for float64), rounded once; b may be a float32 parameter of bfloat16 rows a. With
// preact it is the product of a backward pass: activation'(preact) * (a b), and activation(preact). wide: the result of
// bfloat16 matrices is float32, as it is of float32 ones.
std::tuple<Tensor, Tensor> matmul(const Tensor& a, const Tensor& b, const OptionalTensor& preact,
                                  const std::string& activation, bool wide) {
  int64_t a_stride, b_stride;
  const bool a_columns = by_columns(a, "a", a_stride), b_columns = by_columns(b, "b", b_stride);
  FASTVIT_CHECK(a.size(1) == b.size(0), kOp, ": a's columns must be as many as b's rows");
  const int64_t m = a.size(0), n = b.size(1);
  FASTVIT_CHECK(!wide || a.scalar_type() == ScalarType::BFloat16 || a.scalar_type() == ScalarType::Float, kOp,
                ": a wide result is float32, of bfloat16 or float32 matrices");
  wide = wide && a.scalar_type() == ScalarType::BFloat16;
  FASTVIT_CHECK(!wide || (!preact && b.scalar_type() == a.scalar_type()), kOp,
                ": a wide result is that of two bfloat16 matrices alone");
  Tensor y = empty(a, {m, n}, wide ? ScalarType::Float : a.scalar_type());
  Tensor activated = preact ? empty(a, {m, n}) : empty(a, {0});
  const auto run = [&](auto tag, auto parameter_tag, auto result_tag) {
    using T = decltype(tag);
    using V = decltype(parameter_tag);
    using Y = decltype(result_tag);
    const Rows<T> preact_rows = rows<T>(preact, m, n, a, kOp, "preact");
    GemmArgs<T, V, Y> args;
    args.x = static_cast<const T*>(a.const_data_ptr());
    args.x_stride = a_stride;
    args.x_by_columns = a_columns;
    args.weight = static_cast<const V*>(b.const_data_ptr());
    args.weight_stride = b_stride;
    args.weight_by_columns = !b_columns;
    args.m = m;
    args.n = n;
    args.k = a.size(1);
    args.activation = parse_activation(activation, kOp);
    if constexpr (std::is_same_v<T, Y>) {
      args.slope_at = preact_rows.data;
      args.slope_at_stride = preact_rows.stride;
      args.activated = data<T>(activated);
    }
    args.y = data<Y>(y);
    args.y_stride = n;
    gemm(args);
  };
  FASTVIT_CHECK(preact || activation == "none", kOp, ": an activation needs its preact");
  if (is_autocast(a, b))
    run(bfloat16{}, float{}, bfloat16{});
  else
    dispatch(a, kOp, [&](auto tag) {
      check_like(b, a, a.scalar_type(), kOp, "b");
      if (std::is_same_v<decltype(tag), bfloat16> && wide)
        run(bfloat16{}, bfloat16{}, float{});
      else
        run(tag, tag, tag);
    });
  return {y, activated};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("matmul", TORCH_BOX(&fastvit::matmul)); }
