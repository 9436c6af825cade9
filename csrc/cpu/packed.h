#pragma once

#include <cstdint>

#include "common/check.h"

namespace fastvit {

// What a linear layer's weight is multiplied as.
enum class Compute : int64_t { float32, bfloat16, float64 };

// A linear layer as the kernels read it, in one uint8 tensor: this header, bias and LayerScale as float32 (each padded
// to whole panels, absent ones left out), then the panels. It holds for one instruction set.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x7669747061636b31;
  int64_t magic, isa, compute, n, k, has_bias, has_layer_scale, reserved;

  int64_t vector_bytes() const { return (n + 63) / 64 * 64 * static_cast<int64_t>(sizeof(float)); }
  int64_t bias() const { return sizeof(PackedHeader); }
  int64_t layer_scale() const { return bias() + (has_bias ? vector_bytes() : 0); }
  int64_t panels() const { return layer_scale() + (has_layer_scale ? vector_bytes() : 0); }
};
static_assert(sizeof(PackedHeader) == 64);

struct PackedLinear {
  int64_t n = 0, k = 0;
  Compute compute = Compute::float32;
  const float* bias = nullptr;
  const float* layer_scale = nullptr;
  const void* panels = nullptr;
};

// Throws unless the tensor is a layer (n, k) packed for the active instruction set; any n where it is negative.
PackedLinear packed_linear(const Tensor& t, int64_t n, int64_t k, const char* op, const char* name);

}  // namespace fastvit
