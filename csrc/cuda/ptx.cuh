#pragma once

// The instructions that CUDA C++ has no words for, and the types of their operands. Everything that is not plain C++ is
// in this file, so that another one can stand in for it where there is no GPU (tests/emulation).

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastvit::cuda {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void from_float(float v, float& out) { out = v; }
__device__ inline void from_float(float v, __half& out) { out = __float2half_rn(v); }
__device__ inline void from_float(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Two numbers of 16 bits in a word, the first one low.
template <class T>
__device__ uint32_t packed(float low, float high);

template <>
__device__ inline uint32_t packed<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ inline uint32_t packed<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ float2 unpacked(uint32_t pair);

template <>
__device__ inline float2 unpacked<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <>
__device__ inline float2 unpacked<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

// The compiler forgets what it knows of a word, so that what it computed from it need not stay in registers.
__device__ inline void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ inline void forget(float& word) { asm volatile("" : "+f"(word)); }
__device__ inline void forget(__half& word) { asm volatile("" : "+h"(reinterpret_cast<uint16_t&>(word))); }
__device__ inline void forget(__nv_bfloat16& word) { asm volatile("" : "+h"(reinterpret_cast<uint16_t&>(word))); }

// 2^x to about two units in the last place; 0 for what is below the normal numbers.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d += a b for a (16, 16) and b (16, 8) in 16 bits, sums in float32. Lane 4 i + j holds: of d, rows i and i + 8,
// columns 2 j and 2 j + 1; of a, those rows and columns 2 j, 2 j + 1 (words 0, 1) and 2 j + 8, 2 j + 9 (words 2, 3); of
// b, column i and rows 2 j, 2 j + 1 (b0) and 2 j + 8, 2 j + 9 (b1).
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices (8, 8) of 16 bits from shared memory: lane 8 m + i names row i of matrix m, 16 bytes. Lane 4 i + j
// receives of each matrix row i, columns 2 j and 2 j + 1; transposed, column i, rows 2 j and 2 j + 1. The address has
// the bits of `toggled` changed.
template <bool TRANSPOSED = false>
__device__ inline void load_matrices(uint32_t (&words)[4], const void* row, uint32_t toggled = 0) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row)) ^ toggled;
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// 16 bytes on their way from global to shared memory, or zeros; they are there when this thread has waited for them.
__device__ inline void copy_async(void* shared, const void* global, bool there) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

// All copies since the last commit become a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than PENDING groups of this thread are on their way.
template <int PENDING>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace fastvit::cuda
