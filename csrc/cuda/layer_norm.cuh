#pragma once

#include "cuda/device.cuh"
#include "cuda/layer_norm.h"

namespace fastvit::cuda {

// x to z, in place; to be rounded, because that is what the backward will see.
template <int VEC>
__device__ void residual_sum(float (&x)[VEC], const float (&layer_scale)[VEC], float factor,
                             const float (&residual)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i++) x[i] = x[i] * layer_scale[i] * factor + residual[i];
}

// z to y, in place; what rounding took from the mean is the shift.
template <int VEC>
__device__ void normalise(float (&z)[VEC], float mean, float shift, float rstd, const float (&weight)[VEC],
                          const float (&bias)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i++) z[i] = (z[i] - mean - shift) * rstd * weight[i] + bias[i];
}

// rstd of a row from the sum of its centred squares; the shift is given back.
__device__ inline float reciprocal_deviation(float squares, float shift, int64_t width, float eps) {
  const float variance = squares / static_cast<float>(width) - shift * shift;
  return 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
}

// A warp per row, which stays in registers.
template <class T, int VEC, int MAX_WIDTH, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) layer_norm_warp_kernel(const LayerNorm g) {
  using Row = WarpRow<T, VEC, MAX_WIDTH>;
  const int columns = static_cast<int>(g.width);
  const float width = static_cast<float>(g.width);
  for (int64_t row = blockIdx.x * int64_t{WARPS} + threadIdx.x / 32; row < g.rows; row += gridDim.x * int64_t{WARPS}) {
    Row z;
    float v[VEC], other[VEC], another[VEC];
    float sum[1] = {}, centred_sums[2] = {};
    z.load(g.x, row * g.x_stride, columns);
    if (g.residual) {
      Row residual, layer_scale;
      residual.load(g.residual, row * g.residual_stride, columns);
      layer_scale.load(g.layer_scale, 0, g.layer_scale ? columns : 0, 1.0f);
      const float factor = sample_factor<T>(g.sample_scale, row, g.sample_rows);
#pragma unroll
      for (int s = 0; s < Row::STEPS; s++) {
        unpack(z.packs[s], v);
        unpack(layer_scale.packs[s], other);
        unpack(residual.packs[s], another);
        residual_sum(v, other, factor, another);
        z.packs[s] = pack_of<T>(v);
      }
      z.store(g.z, row * g.width, columns);
    }
#pragma unroll
    for (int s = 0; s < Row::STEPS; s++) {
      unpack(z.packs[s], v);
#pragma unroll
      for (int i = 0; i < VEC; i++) sum[0] += v[i];
    }
    warp_sum(sum);
    const float mean = sum[0] / width;
#pragma unroll
    for (int s = 0; s < Row::STEPS; s++) {
      unpack(z.packs[s], v);
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        const float centred = Row::column(s) < columns ? v[i] - mean : 0.0f;
        centred_sums[0] += centred;
        centred_sums[1] += centred * centred;
      }
    }
    warp_sum(centred_sums);
    const float shift = centred_sums[0] / width;
    const float rstd = reciprocal_deviation(centred_sums[1], shift, g.width, g.eps);
    Row weight, bias;
    weight.load(g.weight, 0, g.weight ? columns : 0, 1.0f);
    bias.load(g.bias, 0, g.bias ? columns : 0);
#pragma unroll
    for (int s = 0; s < Row::STEPS; s++) {
      unpack(z.packs[s], v);
      unpack(weight.packs[s], other);
      unpack(bias.packs[s], another);
      normalise(v, mean, shift, rstd, other, another);
      z.packs[s] = pack_of<T>(v);
    }
    z.store(g.y, row * g.width, columns);
    if (g.mean && threadIdx.x % 32 == 0) {
      g.mean[row] = mean + shift;
      g.rstd[row] = rstd;
    }
  }
}

// A block per row, which is read again for every pass: each thread reads back only what it wrote itself.
template <class T, int VEC, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 4) layer_norm_block_kernel(const LayerNorm g) {
  constexpr int STEP = WARPS * 32 * VEC;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const float width = static_cast<float>(g.width);
  for (int64_t row = blockIdx.x; row < g.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(g.x) + row * g.x_stride;
    const T* residual = static_cast<const T*>(g.residual) + row * g.residual_stride;
    T* sums = static_cast<T*>(g.z) + row * g.width;
    const T* z = g.residual ? sums : x;
    T* y = static_cast<T*>(g.y) + row * g.width;
    const float factor = sample_factor<T>(g.sample_scale, row, g.sample_rows);
    float v[VEC], other[VEC], another[VEC];
    float sum[1] = {}, centred_sums[2] = {};
    for (int64_t column = threadIdx.x * VEC; column < g.width; column += STEP) {
      load<VEC>(x + column, v);
      if (g.residual) {
        load_or<T>(g.layer_scale, column, 1.0f, other);
        load<VEC>(residual + column, another);
        residual_sum(v, other, factor, another);
        const auto rounded = pack_of<T>(v);
        *reinterpret_cast<Pack<T, VEC>*>(sums + column) = rounded;
        unpack(rounded, v);
      }
#pragma unroll
      for (int i = 0; i < VEC; i++) sum[0] += v[i];
    }
    block_sum(sum, shared);
    const float mean = sum[0] / width;
    for (int64_t column = threadIdx.x * VEC; column < g.width; column += STEP) {
      load<VEC>(z + column, v);
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        const float centred = v[i] - mean;
        centred_sums[0] += centred;
        centred_sums[1] += centred * centred;
      }
    }
    block_sum(centred_sums, shared);
    const float shift = centred_sums[0] / width;
    const float rstd = reciprocal_deviation(centred_sums[1], shift, g.width, g.eps);
    for (int64_t column = threadIdx.x * VEC; column < g.width; column += STEP) {
      load<VEC>(z + column, v);
      load_or<T>(g.weight, column, 1.0f, other);
      load_or<T>(g.bias, column, 0.0f, another);
      normalise(v, mean, shift, rstd, other, another);
      store<VEC>(y + column, v);
    }
    if (g.mean && threadIdx.x == 0) {
      g.mean[row] = mean + shift;
      g.rstd[row] = rstd;
    }
  }
}

}  // namespace fastvit::cuda
