#include <torch/csrc/stable/library.h>

#include "cuda/attention_arguments.h"

namespace fastvit {
namespace {

// Writes dq, dk and dv.
void attention_backward_cuda(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                             const OptionalTensor& mask, bool causal, double scale, const OptionalTensor& cu_seqlens,
                             int64_t max_seqlen) {
  const cuda::Dtype dtype = cuda::dtype_of(q, kOp, "q", false);
  cuda::Attention args = arguments(q, k, v, mask, causal, scale, cu_seqlens, max_seqlen);
  const int64_t queries = q.size(2), keys = k.size(2);
  args.out = heads(torch::stable::transpose(out, 1, 2), q, queries, "out");
  args.dout = heads(torch::stable::transpose(dout, 1, 2), q, queries, "dout");
  args.dq = heads(dq, q, queries, "dq");
  args.dk = heads(dk, q, keys, "dk");
  args.dv = heads(dv, q, keys, "dv");
  check_like(lse, q, ScalarType::Float, kOp, "lse");
  FASTVIT_CHECK(lse.is_contiguous() && lse.numel() == q.size(0) * q.size(1) * queries, kOp,
                ": lse must be contiguous and have shape (B, H, N)");
  const cuda::Stream stream(q, kOp);
  Tensor delta = empty(lse, {lse.size(0), lse.size(1), lse.size(2)});
  args.lse = data<float>(lse);
  args.delta = data<float>(delta);
  stream.check(cuda::launch_attention_backward(args, dtype, stream));
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("attention_backward", TORCH_BOX(&fastvit::attention_backward_cuda));
}
