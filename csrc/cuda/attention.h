#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace fastvit::cuda {

enum class MaskKind { none, boolean, additive, additive_float };

// (B, H, tokens, E) with E contiguous, 16 bytes at a time; strides in elements.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

// out = softmax(scale q kᵀ + mask) v and lse = log Σ exp of a row's scores; dq, dk, dv of dout. With cu_seqlens the
// tensors hold one row of `sequences` sequences, and a sequence is longer than `longest` on nobody's word.
struct Attention {
  Heads q, k, v, out, dout, dq, dk, dv;
  float* lse = nullptr;    // (B, H, queries), or null: it is for the backward
  float* delta = nullptr;  // (B, H, queries): of a row, Σ dout out
  const int32_t* cu_seqlens = nullptr;
  const void* mask = nullptr;
  int64_t mask_strides[4] = {};
  MaskKind mask_kind = MaskKind::none;
  int sequences = 0, heads = 0, queries = 0, keys = 0, head_dim = 0;  // sequences times heads is an int too
  int longest = 0;                                                    // rows of a sequence, the most
  float scale = 0;
  bool causal = false;
};

constexpr int kMaxHeadDim = 128;

// Launch on a cudaStream_t of the current device; null or CUDA's error message.
const char* launch_attention(const Attention& args, Dtype dtype, void* stream);
const char* launch_attention_backward(const Attention& args, Dtype dtype, void* stream);

}  // namespace fastvit::cuda
