// 16-bit numbers on a CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulated {

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Of the upper `drop` bits' number, to the nearest, ties to even.
inline uint32_t rounded(uint32_t bits, int drop) {
  return (bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop;
}

inline uint16_t half_of(float v) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude >= 0x38800000) return static_cast<uint16_t>(sign | rounded(magnitude - 0x38000000, 13));
  // Adding 0.5 leaves a subnormal's multiple of 2^-24 in the last bits, rounded by the machine.
  return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + 0x38000000));
  const float v = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -v : v;
}

inline uint16_t bfloat16_of(float v) {
  const uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>(rounded(bits, 16));
}

}  // namespace emulated

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};
