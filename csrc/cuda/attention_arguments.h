#pragma once

// Tensors to the arguments of attention and of its backward.

#include <algorithm>
#include <limits>

#include "cuda/attention.h"
#include "cuda/tensors.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "attention";

cuda::Heads heads(const Tensor& t, const Tensor& like, int64_t rows, const char* name) {
  check_like(t, like, like.scalar_type(), kOp, name);
  FASTVIT_CHECK(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(2) == rows &&
                    t.size(3) == like.size(3),
                kOp, ": ", name, " must have q's shape but for the number of keys, which k and v share");
  const cuda::Heads view{const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
  const int64_t strides = view.batch | view.head | view.token;
  FASTVIT_CHECK(
      t.numel() == 0 || (t.stride(3) == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && strides % 8 == 0), kOp,
      ": heads of ", name, " must begin at multiples of 16 bytes and be contiguous");
  return view;
}

void set_mask(cuda::Attention& args, const Tensor& mask, const Tensor& q, int64_t keys) {
  FASTVIT_CHECK(mask.device() == q.device(), kOp, ": mask must be on q's device");
  FASTVIT_CHECK(mask.dim() == 4 && mask.size(0) == q.size(0) && mask.size(1) == q.size(1) &&
                    mask.size(2) == q.size(2) && mask.size(3) == keys,
                kOp, ": mask must have shape (B, H, N, S)");
  if (mask.scalar_type() == ScalarType::Bool) {
    args.mask_kind = cuda::MaskKind::boolean;
  } else if (mask.scalar_type() == q.scalar_type()) {
    args.mask_kind = cuda::MaskKind::additive;
  } else {
    FASTVIT_CHECK(mask.scalar_type() == ScalarType::Float, kOp, ": mask must be bool, float32 or of q's dtype");
    args.mask_kind = cuda::MaskKind::additive_float;
  }
  args.mask = mask.const_data_ptr();
  for (int i = 0; i < 4; i++) args.mask_strides[i] = mask.stride(i);
}

cuda::Attention arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, bool causal,
                          double scale, const OptionalTensor& cu_seqlens, int64_t max_seqlen) {
  FASTVIT_CHECK(q.dim() == 4 && k.dim() == 4, kOp, ": q, k and v must have shape (B, H, N, E)");
  FASTVIT_CHECK(q.size(3) <= cuda::kMaxHeadDim && q.size(3) % 8 == 0, kOp,
                ": the head dimension must be a multiple of 8 up to ", cuda::kMaxHeadDim, ", got ", q.size(3));
  constexpr int64_t kInt = std::numeric_limits<int>::max() / 2;
  FASTVIT_CHECK(q.size(0) * q.size(1) < kInt && q.size(2) < kInt && k.size(2) < kInt, kOp,
                ": too many heads or tokens");
  cuda::Attention args;
  args.q = heads(q, q, q.size(2), "q");
  args.k = heads(k, q, k.size(2), "k");
  args.v = heads(v, q, k.size(2), "v");
  args.sequences = static_cast<int>(q.size(0));
  args.heads = static_cast<int>(q.size(1));
  args.queries = args.longest = static_cast<int>(q.size(2));
  args.keys = static_cast<int>(k.size(2));
  args.head_dim = static_cast<int>(q.size(3));
  args.scale = static_cast<float>(scale);
  args.causal = causal;
  if (mask) set_mask(args, *mask, q, k.size(2));
  if (cu_seqlens) {
    check_like(*cu_seqlens, q, ScalarType::Int, kOp, "cu_seqlens");
    FASTVIT_CHECK(!mask && q.size(0) == 1 && q.size(2) == k.size(2), kOp, ": cu_seqlens is for one row without a mask");
    FASTVIT_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0 && cu_seqlens->is_contiguous(), kOp,
                  ": cu_seqlens must be (sequences + 1,)");
    FASTVIT_CHECK(cu_seqlens->size(0) * q.size(1) < kInt, kOp, ": too many sequences");
    args.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
    args.sequences = static_cast<int>(cu_seqlens->size(0)) - 1;
    args.longest = static_cast<int>(std::min(max_seqlen, q.size(2)));
  }
  return args;
}

}  // namespace
}  // namespace fastvit
