#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastvit {

enum class MaskKind { none, boolean, additive, additive_float };

// q (B, H, N, E), k and v (B, H, S, E) with contiguous E and strides of B, H and N or S; mask (B, H, N, S), any
// strides; out (B, N, H, E) and lse (B, H, N) contiguous.
template <class T>
struct AttentionArgs {
  using A = accumulator_t<T>;
  int64_t batch = 0, heads = 0, queries = 0, keys = 0, head_dim = 0;
  const T* q = nullptr;
  const T* k = nullptr;
  const T* v = nullptr;
  int64_t q_strides[3] = {}, k_strides[3] = {}, v_strides[3] = {};
  const void* mask = nullptr;
  MaskKind mask_kind = MaskKind::none;
  int64_t mask_strides[4] = {};
  bool causal = false;
  double scale = 1;
  T* out = nullptr;
  A* lse = nullptr;
};

// Gradients of the same; out, dout (B, N, H, E) and lse (B, H, N) contiguous, dq, dk and dv as q, k and v.
template <class T>
struct AttentionBackwardArgs {
  using A = accumulator_t<T>;
  AttentionArgs<T> forward;
  const T* dout = nullptr;
  const T* out = nullptr;
  const A* lse = nullptr;
  T* dq = nullptr;
  T* dk = nullptr;
  T* dv = nullptr;
  int64_t dq_strides[3] = {}, dk_strides[3] = {}, dv_strides[3] = {};
};

}  // namespace fastvit
