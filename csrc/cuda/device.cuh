#pragma once

// Device functions that several kernels use.

#include "cuda/ptx.cuh"

namespace fastvit::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

// VEC elements that move in one instruction.
template <class T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T lane[VEC];
};

template <int VEC, class T>
__device__ void load(const T* p, float (&out)[VEC]) {
  const auto pack = *reinterpret_cast<const Pack<T, VEC>*>(p);
#pragma unroll
  for (int i = 0; i < VEC; i++) out[i] = to_float(pack.lane[i]);
}

template <int VEC, class T>
__device__ void store(T* p, const float (&v)[VEC]) {
  Pack<T, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; i++) from_float(v[i], pack.lane[i]);
  *reinterpret_cast<Pack<T, VEC>*>(p) = pack;
}

// The shared memory that the launch asked for.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return dynamic_shared;
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// Over the four lanes that hold a row of mma's result.
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}

}  // namespace fastvit::cuda
