#pragma once

// Tensors to the arguments of attention and of its backward.

#include "common/check.h"
#include "cpu/attention.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "attention";

template <class T>
const T* heads_view(const Tensor& t, const Tensor& like, int64_t rows, const char* name, int64_t* strides) {
  check_like(t, like, like.scalar_type(), kOp, name);
  FASTVIT_CHECK(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(2) == rows &&
                    t.size(3) == like.size(3),
                kOp, ": ", name, " must have q's shape but for the number of keys, which k and v share");
  FASTVIT_CHECK(t.size(3) <= 1 || t.stride(3) == 1, kOp, ": ", name, " must have a contiguous last dimension");
  for (int i = 0; i < 3; i++) strides[i] = t.stride(i);
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
void set_mask(AttentionArgs<T>& args, const Tensor& mask, const Tensor& q) {
  FASTVIT_CHECK(mask.device() == q.device(), kOp, ": mask must be on q's device");
  FASTVIT_CHECK(mask.dim() == 4 && mask.size(0) == args.batch && mask.size(1) == args.heads &&
                    mask.size(2) == args.queries && mask.size(3) == args.keys,
                kOp, ": mask must have shape (B, H, N, S)");
  if (mask.scalar_type() == ScalarType::Bool) {
    args.mask_kind = MaskKind::boolean;
  } else if (mask.scalar_type() == q.scalar_type()) {
    args.mask_kind = MaskKind::additive;
  } else {
    FASTVIT_CHECK(mask.scalar_type() == ScalarType::Float, kOp, ": mask must be bool, float32 or of q's dtype");
    args.mask_kind = MaskKind::additive_float;
  }
  args.mask = mask.const_data_ptr();
  for (int i = 0; i < 4; i++) args.mask_strides[i] = mask.stride(i);
}

template <class T>
AttentionArgs<T> arguments(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, bool causal,
                           double scale) {
  AttentionArgs<T> args;
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.queries = q.size(2);
  args.keys = k.size(2);
  args.head_dim = q.size(3);
  args.q = heads_view<T>(q, q, args.queries, "q", args.q_strides);
  args.k = heads_view<T>(k, q, args.keys, "k", args.k_strides);
  args.v = heads_view<T>(v, q, args.keys, "v", args.v_strides);
  if (mask) set_mask(args, *mask, q);
  args.causal = causal;
  args.scale = scale;
  return args;
}

}  // namespace
}  // namespace fastvit
