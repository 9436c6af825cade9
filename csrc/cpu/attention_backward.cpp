#include <torch/csrc/stable/library.h>

#include "cpu/attention_arguments.h"

#define FASTVIT_KERNELS "cpu/attention_backward_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

template <class T>
T* gradient(const Tensor& t, const Tensor& like, int64_t rows, const char* name, int64_t* strides) {
  return const_cast<T*>(heads_view<T>(t, like, rows, name, strides));
}

template <class T>
const T* contiguous(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype, const char* name) {
  FASTVIT_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.dim() == static_cast<int64_t>(shape.size()), kOp,
                ": ", name, " must be contiguous and of its dtype");
  int64_t i = 0;
  for (int64_t size : shape) FASTVIT_CHECK(t.size(i++) == size, kOp, ": ", name, " has a wrong shape");
  return static_cast<const T*>(t.const_data_ptr());
}

// Writes dq, dk and dv.
void attention_backward_op(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                           const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                           const OptionalTensor& mask, bool causal, double scale, const OptionalTensor& cu_seqlens,
                           int64_t) {
  FASTVIT_CHECK(!cu_seqlens, kOp, ": the CPU kernels take no cu_seqlens");
  FASTVIT_CHECK(q.dim() == 4 && k.dim() == 4, kOp, ": q, k and v must have shape (B, H, N, E)");
  dispatch(q, kOp, [&](auto tag) {
    using T = decltype(tag);
    AttentionBackwardArgs<T> args;
    args.forward = arguments<T>(q, k, v, mask, causal, scale);
    const auto& f = args.forward;
    args.dout = contiguous<T>(dout, {f.batch, f.queries, f.heads, f.head_dim}, q.scalar_type(), "dout");
    args.out = contiguous<T>(out, {f.batch, f.queries, f.heads, f.head_dim}, q.scalar_type(), "out");
    args.lse = contiguous<accumulator_t<T>>(lse, {f.batch, f.heads, f.queries}, statistics_dtype(q), "lse");
    args.dq = gradient<T>(dq, q, f.queries, "dq", args.dq_strides);
    args.dk = gradient<T>(dk, q, f.keys, "dk", args.dk_strides);
    args.dv = gradient<T>(dv, q, f.keys, "dv", args.dv_strides);
    FASTVIT_SELECT(attention_backward<T>)(args);
  });
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&fastvit::attention_backward_op));
}
