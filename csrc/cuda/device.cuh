#pragma once

// Device functions that several kernels use.

#include <type_traits>

#include "cuda/ptx.cuh"

namespace fastvit::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

// VEC elements that move in one instruction. Numbers of 16 bits lie in pairs, as registers hold them.
template <class T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  static constexpr bool PAIRS = sizeof(T) == 2 && VEC % 2 == 0;
  std::conditional_t<PAIRS, uint32_t, T> words[PAIRS ? VEC / 2 : VEC];
};

template <class T, int VEC>
__device__ void unpack(const Pack<T, VEC>& pack, float (&out)[VEC]) {
  if constexpr (Pack<T, VEC>::PAIRS) {
#pragma unroll
    for (int i = 0; i < VEC / 2; i++) {
      const float2 pair = unpacked<T>(pack.words[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) out[i] = to_float(pack.words[i]);
  }
}

template <class T, int VEC>
__device__ Pack<T, VEC> pack_of(const float (&v)[VEC]) {
  Pack<T, VEC> pack;
  if constexpr (Pack<T, VEC>::PAIRS) {
#pragma unroll
    for (int i = 0; i < VEC / 2; i++) pack.words[i] = packed<T>(v[2 * i], v[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) from_float(v[i], pack.words[i]);
  }
  return pack;
}

template <int VEC, class T>
__device__ void load(const T* p, float (&out)[VEC]) {
  const auto pack = *reinterpret_cast<const Pack<T, VEC>*>(p);
  unpack(pack, out);
}

// Of a row that may be absent.
template <class T, int VEC>
__device__ void load_or(const void* row, int64_t column, float otherwise, float (&out)[VEC]) {
  if (row) return load<VEC>(static_cast<const T*>(row) + column, out);
#pragma unroll
  for (int i = 0; i < VEC; i++) out[i] = otherwise;
}

template <int VEC, class T>
__device__ void store(T* p, const float (&v)[VEC]) {
  *reinterpret_cast<Pack<T, VEC>*>(p) = pack_of<T>(v);
}

// A row of a matrix in a warp's registers: of each 32 * VEC columns a lane holds VEC neighbours. All its loads are on
// their way before the first is waited for.
template <class T, int VEC, int MAX_WIDTH>
struct WarpRow {
  static constexpr int STEP = 32 * VEC, STEPS = MAX_WIDTH / STEP;

  Pack<T, VEC> packs[STEPS];

  static __device__ int column(int step) { return step * STEP + static_cast<int>(threadIdx.x % 32) * VEC; }

  // Rows that are absent have no width.
  __device__ void load(const void* matrix, int64_t offset, int width, float beyond_width = 0) {
    float v[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = beyond_width;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      packs[s] = pack_of<T>(v);
      if (column(s) < width)
        packs[s] = *reinterpret_cast<const Pack<T, VEC>*>(static_cast<const T*>(matrix) + offset + column(s));
    }
  }

  __device__ void store(void* matrix, int64_t offset, int width) const {
#pragma unroll
    for (int s = 0; s < STEPS; s++)
      if (column(s) < width) *reinterpret_cast<Pack<T, VEC>*>(static_cast<T*>(matrix) + offset + column(s)) = packs[s];
  }

  // What was computed from it is computed again from here on, where the compiler would rather keep more registers.
  __device__ void forget() {
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (auto& word : packs[s].words) cuda::forget(word);
  }
};

// The shared memory that the launch asked for.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return dynamic_shared;
}

// Several sums at once: none waits for another one's shuffles.
template <int N>
__device__ void warp_sum(float (&v)[N]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    float other[N];
#pragma unroll
    for (int i = 0; i < N; i++) other[i] = __shfl_xor_sync(kAllLanes, v[i], offset);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += other[i];
  }
}

// Sums over the block, in every thread; shared holds N floats per warp.
template <int N>
__device__ void block_sum(float (&v)[N], float* shared) {
  warp_sum(v);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++)
    if (threadIdx.x % 32 == 0) shared[warp * N + i] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
    v[i] = 0;
    for (int w = 0; w < warps; w++) v[i] += shared[w * N + i];
  }
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

// What stochastic depth multiplies a row's branch with; a sample's rows are neighbours.
template <class T>
__device__ float sample_factor(const void* sample_scale, int64_t row, int64_t sample_rows) {
  return sample_scale ? to_float(static_cast<const T*>(sample_scale)[row / sample_rows]) : 1.0f;
}

}  // namespace fastvit::cuda
