#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/check.h"
#include "cpu/parallel.h"

#define FASTVIT_KERNELS "cpu/column_sum_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "column_sum";
// A thread sums columns from top to bottom, so that the bits do not depend on their number; one chain of roundings is
// no longer than this.
constexpr int64_t kColumns = 64, kChain = 64;

Tensor column_sum(const Tensor& x) {
  FASTVIT_CHECK(x.dim() == 2, kOp, ": x must have shape (M, N)");
  const int64_t m = x.size(0), n = x.size(1);
  Tensor y = empty(x, {n}, statistics_dtype(x));
  dispatch(x, kOp, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulator_t<T>;
    const Rows<T> in = rows<T>(x, m, n, x, kOp, "x");
    A* const out = data<A>(y);
    std::fill(out, out + n, A(0));
    const auto add = FASTVIT_SELECT(add_rows<T>);
    parallel_for((n + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kColumns, last = std::min(end * kColumns, n);
      for (int64_t row = 0; row < m; row += kChain)
        add(in.data, in.stride, row, std::min(row + kChain, m), first, last, out);
    });
  });
  return y;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("column_sum", TORCH_BOX(&fastvit::column_sum)); }
