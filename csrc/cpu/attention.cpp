#include "cpu/attention_arguments.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#define FASTVIT_KERNELS "cpu/attention_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

std::tuple<Tensor, Tensor> attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                        bool causal, double scale, const OptionalTensor& cu_seqlens, int64_t) {
  FASTVIT_CHECK(!cu_seqlens, kOp, ": the CPU kernels take no cu_seqlens");
  FASTVIT_CHECK(q.dim() == 4 && k.dim() == 4, kOp, ": q, k and v must have shape (B, H, N, E)");
  Tensor out = empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)});
  Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2)}, statistics_dtype(q));
  dispatch(q, kOp, [&](auto tag) {
    using T = decltype(tag);
    AttentionArgs<T> args = arguments<T>(q, k, v, mask, causal, scale);
    args.out = data<T>(out);
    args.lse = data<accumulator_t<T>>(lse);
    FASTVIT_SELECT(attention<T>)(args);
  });
  return {out, lse};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("attention", TORCH_BOX(&fastvit::attention_op)); }
