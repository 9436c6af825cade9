#include "cuda/attention_arguments.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastvit {
namespace {

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                          bool causal, double scale, const OptionalTensor& cu_seqlens,
                                          int64_t max_seqlen) {
  const cuda::Dtype dtype = cuda::dtype_of(q, kOp, "q", false);
  cuda::Attention args = arguments(q, k, v, mask, causal, scale, cu_seqlens, max_seqlen);
  const cuda::Stream stream(q, kOp);
  Tensor out = empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)});
  Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  args.out = {out.mutable_data_ptr(), out.stride(0), out.stride(2), out.stride(1)};
  args.lse = data<float>(lse);
  stream.check(cuda::launch_attention(args, dtype, stream));
  return {out, lse};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("attention", TORCH_BOX(&fastvit::attention_cuda));
}
