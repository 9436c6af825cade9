// Stands in for csrc/cuda/ptx.cuh: the same functions on a CPU. What lanes of a warp do together, the last one to come
// does for all of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace fastvit::cuda {

inline float to_float(float v) { return v; }
inline float to_float(__half v) { return emulated::float_of_half(v.bits); }
inline float to_float(__nv_bfloat16 v) { return emulated::float_of(static_cast<uint32_t>(v.bits) << 16); }
inline void from_float(float v, float& out) { out = v; }
inline void from_float(float v, __half& out) { out.bits = emulated::half_of(v); }
inline void from_float(float v, __nv_bfloat16& out) { out.bits = emulated::bfloat16_of(v); }

template <class T>
uint32_t packed(float low, float high) {
  T a, b;
  from_float(low, a), from_float(high, b);
  return static_cast<uint32_t>(b.bits) << 16 | a.bits;
}

template <class T>
float2 unpacked(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

template <class T>
void forget(T&) {}

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

struct MmaOperands {
  float d[4];
  uint32_t a[4], b[2];
};

template <class T>
void mma_of_warp(const MmaOperands* in, MmaOperands* out) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int i = lane / 4, j = lane % 4;
    for (int word = 0; word < 4; word++) {
      const float2 pair = unpacked<T>(in[lane].a[word]);
      a[i + word % 2 * 8][2 * j + word / 2 * 8] = pair.x;
      a[i + word % 2 * 8][2 * j + word / 2 * 8 + 1] = pair.y;
    }
    for (int word = 0; word < 2; word++) {
      const float2 pair = unpacked<T>(in[lane].b[word]);
      b[2 * j + word * 8][i] = pair.x;
      b[2 * j + word * 8 + 1][i] = pair.y;
    }
    for (int k = 0; k < 4; k++) d[i + k / 2 * 8][2 * j + k % 2] = in[lane].d[k];
  }
  for (int row = 0; row < 16; row++)
    for (int e = 0; e < 16; e++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][e] * b[e][column];
  for (int lane = 0; lane < 32; lane++)
    for (int k = 0; k < 4; k++) out[lane].d[k] = d[lane / 4 + k / 2 * 8][lane % 4 * 2 + k % 2];
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const MmaOperands mine{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const MmaOperands result = emulated::together<MmaOperands>("mma", mine, mma_of_warp<T>);
  for (int k = 0; k < 4; k++) d[k] = result.d[k];
}

struct Matrices {
  const uint16_t* row;
  uint32_t words[4];
};

template <bool TRANSPOSED>
void load_matrices_of_warp(const Matrices* in, Matrices* out) {
  for (int lane = 0; lane < 32; lane++) {
    for (int m = 0; m < 4; m++) {
      const int i = lane / 4, j = lane % 4;
      const auto word = [&](int row, int column) -> uint32_t { return in[8 * m + row].row[column]; };
      out[lane].words[m] =
          TRANSPOSED ? word(2 * j, i) | word(2 * j + 1, i) << 16 : word(i, 2 * j) | word(i, 2 * j + 1) << 16;
    }
  }
}

template <bool TRANSPOSED = false>
void load_matrices(uint32_t (&words)[4], const void* row, uint32_t toggled = 0) {
  row = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(row) ^ toggled);
  emulated::check_shared(row, 16, "ldmatrix");
  const Matrices mine{static_cast<const uint16_t*>(row), {}};
  const Matrices result = emulated::together<Matrices>("ldmatrix", mine, load_matrices_of_warp<TRANSPOSED>);
  for (int m = 0; m < 4; m++) words[m] = result.words[m];
}

inline void copy_async(void* shared, const void* global, bool there) {
  emulated::check_shared(shared, 16, "cp.async");
  if (there && reinterpret_cast<uintptr_t>(global) % 16) emulated::fail("cp.async from an address off 16 bytes");
  emulated::copy_later(shared, there ? global : nullptr);
}

inline void commit_copies() { emulated::commit_copies(); }

template <int PENDING>
void wait_for_copies() {
  emulated::wait_for_copies(PENDING);
}

}  // namespace fastvit::cuda
