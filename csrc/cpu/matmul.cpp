#include <torch/csrc/stable/library.h>

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

// a b, sums in float32 (float64 for float64), rounded once.
Tensor matmul(const Tensor& a, const Tensor& b) {
  int64_t a_stride, b_stride;
  const bool a_columns = by_columns(a, "a", a_stride), b_columns = by_columns(b, "b", b_stride);
  check_like(b, a, a.scalar_type(), kOp, "b");
  FASTVIT_CHECK(a.size(1) == b.size(0), kOp, ": a's columns must be as many as b's rows");
  Tensor y = empty(a, {a.size(0), b.size(1)});
  dispatch(a, kOp, [&](auto tag) {
    using T = decltype(tag);
    GemmArgs<T> args;
    args.x = static_cast<const T*>(a.const_data_ptr());
    args.x_stride = a_stride;
    args.x_by_columns = a_columns;
    args.weight = static_cast<const T*>(b.const_data_ptr());
    args.weight_stride = b_stride;
    args.weight_by_columns = !b_columns;
    args.m = a.size(0);
    args.n = b.size(1);
    args.k = a.size(1);
    args.y = data<T>(y);
    args.y_stride = args.n;
    gemm(args);
  });
  return y;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("matmul", TORCH_BOX(&fastvit::matmul)); }
