#pragma once

#include <cstdint>

#include "common/check.h"

namespace fastvit {

// What a linear layer's weight is multiplied as.
enum class Compute : int64_t { float32, bfloat16, float64, int8 };

// A linear layer's weight as the kernels read it, in one uint8 tensor: this header, for int8 two vectors of N padded to
// 64, then the panels. It holds for one instruction set.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x7669747061636b31;
  int64_t magic, isa, compute, n, k, reserved[3];

  int64_t vector_bytes() const {
    return static_cast<Compute>(compute) == Compute::int8 ? (n + 63) / 64 * 64 * sizeof(float) : 0;
  }
  int64_t panels() const { return sizeof(PackedHeader) + 2 * vector_bytes(); }
};
static_assert(sizeof(PackedHeader) == 64);

struct PackedWeight {
  int64_t n = 0, k = 0;
  Compute compute = Compute::float32;
  const float* step = nullptr;  // int8: of each row, weight = step * byte
  const float* sum = nullptr;   // int8: of each row, the sum of its weights
  const void* panels = nullptr;
};

// Throws unless the tensor is a weight (n, k) packed for the active instruction set; any n or k where it is
// negative.
PackedWeight packed_weight(const Tensor& t, int64_t n, int64_t k, const char* op, const char* name);

// What a weight of T is packed for.
template <class T>
constexpr Compute kComputeOf = Compute::float32;
template <>
inline constexpr Compute kComputeOf<bfloat16> = Compute::bfloat16;
template <>
inline constexpr Compute kComputeOf<double> = Compute::float64;

// The panels of a weight (n, k) of T, or null where it was not packed beforehand.
template <class T>
const void* panels_of(const OptionalTensor& t, int64_t n, int64_t k, const char* op, const char* name) {
  if (!t) return nullptr;
  const PackedWeight w = packed_weight(*t, n, k, op, name);
  FASTVIT_CHECK(w.compute == kComputeOf<T>, op, ": ", name, " was packed for another dtype");
  return w.panels;
}

}  // namespace fastvit
