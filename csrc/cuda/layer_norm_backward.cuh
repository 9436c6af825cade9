#pragma once

#include "cuda/device.cuh"
#include "cuda/layer_norm_backward.h"

namespace fastvit::cuda {

// Two stages without atomics, so that bits repeat: blocks sum over the rows that fall to them, then over blocks.

// What a row has in common for all its columns.
struct RowGradient {
  float mean, rstd, factor;
  float gradient = 0, along = 0;  // E[h] and E[h n]

  template <class T>
  static __device__ RowGradient of(const LayerNormBackward& g, int64_t row) {
    return {g.mean[row], g.rstd[row], sample_factor<T>(g.sample_scale, row, g.sample_rows)};
  }
};

// At a column: adds to the sums of h, of h n, and to those of dy n and dy over rows.
template <int VEC>
__device__ void add_row(const RowGradient& row, const float (&z)[VEC], const float (&dy)[VEC],
                        const float (&weight)[VEC], float (&sums)[2], float (&dweight)[VEC], float (&dbias)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    const float n = (z[i] - row.mean) * row.rstd, h = dy[i] * weight[i];
    sums[0] += h;
    sums[1] += h * n;
    dweight[i] += dy[i] * n;
    dbias[i] += dy[i];
  }
}

// z to d, in place.
template <int VEC>
__device__ void residual_gradient(const RowGradient& row, float (&z)[VEC], const float (&dy)[VEC],
                                  const float (&weight)[VEC], const float (&dz)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    const float n = (z[i] - row.mean) * row.rstd;
    z[i] = row.rstd * (dy[i] * weight[i] - row.gradient - n * row.along) + dz[i];
  }
}

// d to dx, in place, and what the row adds to the layer scale's gradient; x and layer_scale are there if SCALED.
template <bool SCALED, int VEC>
__device__ void branch_gradient(const RowGradient& row, float (&d)[VEC], const float (&x)[VEC],
                                const float (&layer_scale)[VEC], float (&dlayer_scale)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    d[i] *= row.factor;
    if constexpr (SCALED) {
      dlayer_scale[i] += d[i] * x[i];
      d[i] *= layer_scale[i];
    }
  }
}

// The sums of a block's warps, in the order of their numbers, to its row of `partial`.
template <int VEC, int STEPS, int WARPS>
__device__ void write_partial(const LayerNormBackward& g, const float (&sums)[STEPS][VEC], int kind, int kinds) {
  constexpr int MAX_WIDTH = STEPS * 32 * VEC;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
#pragma unroll
  for (int s = 0; s < STEPS; s++)
    store<VEC>(shared + threadIdx.x / 32 * MAX_WIDTH + (s * 32 + threadIdx.x % 32) * VEC, sums[s]);
  __syncthreads();
  float* partial = g.partial + (int64_t{blockIdx.x} * kinds + kind) * g.width;
  for (int column = threadIdx.x; column < g.width; column += WARPS * 32) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += shared[w * MAX_WIDTH + column];
    partial[column] = sum;
  }
}

// A warp per row, which stays in registers, as do the sums over the warp's rows. Two blocks fill a multiprocessor.
template <class T, int VEC, int MAX_WIDTH, bool SCALED, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 2) layer_norm_backward_warp_kernel(const LayerNormBackward g) {
  using Row = WarpRow<T, VEC, MAX_WIDTH>;
  constexpr int STEPS = Row::STEPS, KINDS = SCALED ? 3 : 2;
  const int columns = static_cast<int>(g.width);
  const float width = static_cast<float>(g.width);
  float dweight[STEPS][VEC] = {}, dbias[STEPS][VEC] = {}, dlayer_scale[STEPS][VEC] = {};
  Row weights;  // unless x takes up their registers
  weights.load(g.weight, 0, g.weight && !SCALED ? columns : 0, 1.0f);
  for (int64_t r = blockIdx.x * int64_t{WARPS} + threadIdx.x / 32; r < g.rows; r += gridDim.x * int64_t{WARPS}) {
    Row z, dy, dz, x;
    z.load(g.z, r * g.z_stride, columns);
    dy.load(g.dy, r * g.dy_stride, columns);
    dz.load(g.dz, r * g.dz_stride, g.dz ? columns : 0);
    if constexpr (SCALED) x.load(g.x, r * g.x_stride, columns);
    RowGradient row = RowGradient::of<T>(g, r);
    float d[VEC], upstream[VEC], weight[VEC], other[VEC], scale[VEC];
    float sums[2] = {};
    weights.forget();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const int column = Row::column(s) < columns ? Row::column(s) : 0;  // any weight will do where dy is 0
      unpack(z.packs[s], d);
      unpack(dy.packs[s], upstream);
      unpack(weights.packs[s], weight);
      if constexpr (SCALED) load_or<T>(g.weight, column, 1.0f, weight);
      add_row(row, d, upstream, weight, sums, dweight[s], dbias[s]);
    }
    warp_sum(sums);
    row.gradient = sums[0] / width;
    row.along = sums[1] / width;
    // Else n and h would stay for all columns.
    z.forget();
    dy.forget();
    dz.forget();
    weights.forget();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const int column = Row::column(s) < columns ? Row::column(s) : 0;
      unpack(z.packs[s], d);
      unpack(dy.packs[s], upstream);
      unpack(weights.packs[s], weight);
      if constexpr (SCALED) load_or<T>(g.weight, column, 1.0f, weight);
      unpack(dz.packs[s], other);
      residual_gradient(row, d, upstream, weight, other);
      z.packs[s] = pack_of<T>(d);
      if constexpr (SCALED) {
        unpack(x.packs[s], other);
        load_or<T>(g.layer_scale, column, 0.0f, scale);
      }
      branch_gradient<SCALED>(row, d, other, scale, dlayer_scale[s]);
      dz.packs[s] = pack_of<T>(d);
    }
    z.store(g.d, r * g.width, columns);
    if (g.dx) dz.store(g.dx, r * g.width, columns);
  }
  write_partial<VEC, STEPS, WARPS>(g, dweight, 0, KINDS);
  write_partial<VEC, STEPS, WARPS>(g, dbias, 1, KINDS);
  if constexpr (SCALED) write_partial<VEC, STEPS, WARPS>(g, dlayer_scale, 2, KINDS);
}

// A block per row. The sums over rows lie in shared memory, or in `partial` where they are too many; no thread touches
// another one's columns.
template <class T, int VEC, bool SCALED>
__global__ void __launch_bounds__(256, 4) layer_norm_backward_block_kernel(const LayerNormBackward g) {
  constexpr int KINDS = SCALED ? 3 : 2;
  const int64_t first = int64_t{threadIdx.x} * VEC, step = int64_t{blockDim.x} * VEC;
  const float width = static_cast<float>(g.width);
  auto* shared = reinterpret_cast<float*>(shared_memory());
  float* partial = g.partial + blockIdx.x * KINDS * g.width;
  float* dweight = g.sums_in_shared ? shared : partial;
  float* dbias = dweight + g.width;
  float* dlayer_scale = dbias + g.width;
  float* row_sums = g.sums_in_shared ? shared + KINDS * g.width : shared;
  float d[VEC], upstream[VEC], gamma[VEC], other[VEC], scale[VEC], sum[VEC] = {}, sum_of_dy[VEC];
  for (int64_t column = first; column < g.width; column += step)
    for (int kind = 0; kind < KINDS; kind++) store<VEC>(dweight + kind * g.width + column, sum);
  for (int64_t r = blockIdx.x; r < g.rows; r += gridDim.x) {
    const T* z = static_cast<const T*>(g.z) + r * g.z_stride;
    const T* dy = static_cast<const T*>(g.dy) + r * g.dy_stride;
    const T* dz = static_cast<const T*>(g.dz) + r * g.dz_stride;
    const T* x = static_cast<const T*>(g.x) + r * g.x_stride;
    RowGradient row = RowGradient::of<T>(g, r);
    float sums[2] = {};
    for (int64_t column = first; column < g.width; column += step) {
      load<VEC>(z + column, d);
      load<VEC>(dy + column, upstream);
      load_or<T>(g.weight, column, 1.0f, gamma);
      load<VEC>(dweight + column, sum);
      load<VEC>(dbias + column, sum_of_dy);
      add_row(row, d, upstream, gamma, sums, sum, sum_of_dy);
      store<VEC>(dweight + column, sum);
      store<VEC>(dbias + column, sum_of_dy);
    }
    block_sum(sums, row_sums);
    row.gradient = sums[0] / width;
    row.along = sums[1] / width;
    for (int64_t column = first; column < g.width; column += step) {
      load<VEC>(z + column, d);
      load<VEC>(dy + column, upstream);
      load_or<T>(g.weight, column, 1.0f, gamma);
      load_or<T>(g.dz ? dz : nullptr, column, 0.0f, other);
      if constexpr (SCALED) {
        load<VEC>(static_cast<const T*>(g.layer_scale) + column, scale);
        load<VEC>(dlayer_scale + column, sum);
      }
      residual_gradient(row, d, upstream, gamma, other);
      store<VEC>(static_cast<T*>(g.d) + r * g.width + column, d);
      if constexpr (SCALED) load<VEC>(x + column, other);
      branch_gradient<SCALED>(row, d, other, scale, sum);
      if constexpr (SCALED) store<VEC>(dlayer_scale + column, sum);
      if (g.dx) store<VEC>(static_cast<T*>(g.dx) + r * g.width + column, d);
    }
  }
  if (!g.sums_in_shared) return;
  for (int64_t column = first; column < g.width; column += step)
    for (int kind = 0; kind < KINDS; kind++) {
      load<VEC>(dweight + kind * g.width + column, sum);
      store<VEC>(partial + kind * g.width + column, sum);
    }
}

// The second stage: 32 columns of `partial` per block, a share of its rows per warp.
template <class T, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) layer_norm_backward_sum_kernel(const LayerNormBackward g) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t columns = (g.layer_scale ? 3 : 2) * g.width;
  for (int64_t start = int64_t{blockIdx.x} * 32; start < columns; start += int64_t{gridDim.x} * 32) {
    const int64_t column = start + lane;
    float sum = 0;
    if (column < columns) {
#pragma unroll 8
      for (int64_t block = warp; block < g.blocks; block += WARPS) sum += g.partial[block * columns + column];
    }
    __syncthreads();
    shared[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp == 0 && column < columns) {
      for (int w = 1; w < WARPS; w++) sum += shared[w * 32 + lane];
      const int64_t kind = column / g.width;
      void* const gradient = kind == 0 ? g.dweight : kind == 1 ? g.dbias : g.dlayer_scale;
      from_float(sum, static_cast<T*>(gradient)[column - kind * g.width]);
    }
  }
}

}  // namespace fastvit::cuda
