#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cpu/attention.h"
#include "cpu/packed.h"

namespace fastvit {

struct LinearArgs {
  PackedWeight weight;
  const float* bias = nullptr;
  const float* layer_scale = nullptr;
};

struct BlockArgs {
  const float* norm1_weight = nullptr;  // as the other three of (D,), or null
  const float* norm1_bias = nullptr;
  const float* norm2_weight = nullptr;
  const float* norm2_bias = nullptr;
  double norm1_eps = 0, norm2_eps = 0;
  LinearArgs qkv, proj, fc1, fc2;
};

// x and y (B, N, D), contiguous, of the type that `encode` is told. The residual stream between the blocks is float32.
struct EncoderArgs {
  const BlockArgs* blocks = nullptr;
  int64_t depth = 0, batch = 0, tokens = 0, width = 0, heads = 0, hidden = 0;
  double scale = 1;
  Activation activation = Activation::gelu;
  bool int8 = false;  // whether any weight is
  const void* x = nullptr;
  void* y = nullptr;
};

}  // namespace fastvit
