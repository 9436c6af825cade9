#pragma once

#include "cuda/device.cuh"
#include "cuda/layer_norm.h"

namespace fastvit::cuda {

// One row of z at a column: read, or made from x and the residual, rounded and written.
template <int VEC, class T>
__device__ void load_z(const LayerNorm& g, int64_t row, int64_t column, float (&v)[VEC]) {
  load<VEC>(static_cast<const T*>(g.x) + row * g.x_stride + column, v);
  if (!g.residual) return;
  float other[VEC];
  if (g.layer_scale) {
    load<VEC>(static_cast<const T*>(g.layer_scale) + column, other);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] *= other[i];
  }
  load<VEC>(static_cast<const T*>(g.residual) + row * g.residual_stride + column, other);
  T* z = static_cast<T*>(g.z) + row * g.width + column;
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    T rounded;
    from_float(v[i] + other[i], rounded);
    v[i] = to_float(rounded);
  }
  store<VEC>(z, v);
}

template <int VEC, class T>
__device__ void normalise(const LayerNorm& g, int64_t row, int64_t column, float mean, float shift, float rstd,
                          float (&v)[VEC]) {
  float other[VEC];
#pragma unroll
  for (int i = 0; i < VEC; i++) v[i] = (v[i] - mean - shift) * rstd;
  if (g.weight) {
    load<VEC>(static_cast<const T*>(g.weight) + column, other);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] *= other[i];
  }
  if (g.bias) {
    load<VEC>(static_cast<const T*>(g.bias) + column, other);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] += other[i];
  }
  store<VEC>(static_cast<T*>(g.y) + row * g.width + column, v);
}

// The sum over the block, in every thread; shared holds a float per warp.
template <int WARPS>
__device__ float block_sum(float v, float* shared) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) total += shared[i];
  return total;
}

// rstd of a row from the sum of its centred squares; what rounding took from the mean (shift) is given back.
__device__ inline float reciprocal_deviation(float squares, float shift, int64_t width, float eps) {
  const float variance = squares / static_cast<float>(width) - shift * shift;
  return 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
}

// A warp per row, which stays in registers.
template <class T, int VEC, int MAX_WIDTH, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) layer_norm_warp_kernel(LayerNorm g) {
  constexpr int STEP = 32 * VEC, STEPS = MAX_WIDTH / STEP;
  const int lane = threadIdx.x % 32;
  const float width = static_cast<float>(g.width);
  for (int64_t row = blockIdx.x * int64_t{WARPS} + threadIdx.x / 32; row < g.rows; row += gridDim.x * int64_t{WARPS}) {
    float v[STEPS][VEC];
    float sum = 0, remainder = 0, squares = 0;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const int column = s * STEP + lane * VEC;
      if (column >= g.width) break;
      load_z<VEC, T>(g, row, column, v[s]);
#pragma unroll
      for (int i = 0; i < VEC; i++) sum += v[s][i];
    }
    const float mean = warp_sum(sum) / width;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      if (s * STEP + lane * VEC >= g.width) break;
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        const float centred = v[s][i] - mean;
        remainder += centred;
        squares += centred * centred;
      }
    }
    const float shift = warp_sum(remainder) / width;
    const float rstd = reciprocal_deviation(warp_sum(squares), shift, g.width, g.eps);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const int column = s * STEP + lane * VEC;
      if (column >= g.width) break;
      normalise<VEC, T>(g, row, column, mean, shift, rstd, v[s]);
    }
    if (lane == 0) {
      g.mean[row] = mean + shift;
      g.rstd[row] = rstd;
    }
  }
}

// A block per row, which is read again for every pass: each thread reads back only what it wrote itself.
template <class T, int VEC, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) layer_norm_block_kernel(LayerNorm g) {
  constexpr int STEP = WARPS * 32 * VEC;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const float width = static_cast<float>(g.width);
  for (int64_t row = blockIdx.x; row < g.rows; row += gridDim.x) {
    const T* z =
        g.residual ? static_cast<const T*>(g.z) + row * g.width : static_cast<const T*>(g.x) + row * g.x_stride;
    float v[VEC];
    float sum = 0, remainder = 0, squares = 0;
    for (int64_t column = threadIdx.x * VEC; column < g.width; column += STEP) {
      load_z<VEC, T>(g, row, column, v);
#pragma unroll
      for (int i = 0; i < VEC; i++) sum += v[i];
    }
    const float mean = block_sum<WARPS>(sum, shared) / width;
    for (int64_t column = threadIdx.x * VEC; column < g.width; column += STEP) {
      load<VEC>(z + column, v);
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        const float centred = v[i] - mean;
        remainder += centred;
        squares += centred * centred;
      }
    }
    const float shift = block_sum<WARPS>(remainder, shared) / width;
    const float rstd = reciprocal_deviation(block_sum<WARPS>(squares, shared), shift, g.width, g.eps);
    for (int64_t column = threadIdx.x * VEC; column < g.width; column += STEP) {
      load<VEC>(z + column, v);
      normalise<VEC, T>(g, row, column, mean, shift, rstd, v);
    }
    if (threadIdx.x == 0) {
      g.mean[row] = mean + shift;
      g.rstd[row] = rstd;
    }
  }
}

}  // namespace fastvit::cuda
