#pragma once

#include "cuda/activation.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/epilogue.h"

namespace fastvit::cuda {

template <class T, int VEC>
__global__ void __launch_bounds__(kRowWarps * 32) epilogue_kernel(const __grid_constant__ Epilogue g) {
  const RowTile<VEC> tile(g.width);
  if (tile.column >= g.width) return;
  float scale[VEC];
  if (g.layer_scale) load<VEC>(static_cast<const T*>(g.layer_scale) + tile.column, scale);
  for (int64_t row = tile.row; row < g.rows; row += tile.row_step) {
    const int64_t at = row * g.width + tile.column;
    float v[VEC], residual[VEC];
    load<VEC>(static_cast<const T*>(g.h) + at, v);
    if (g.residual) load<VEC>(static_cast<const T*>(g.residual) + row * g.residual_stride + tile.column, residual);
    activate(v, g.activation);
    if (g.layer_scale) {
#pragma unroll
      for (int i = 0; i < VEC; i++) v[i] *= scale[i];
    }
    if (g.sample_scale) {
      const float sample = to_float(static_cast<const T*>(g.sample_scale)[row / g.sample_rows]);
#pragma unroll
      for (int i = 0; i < VEC; i++) v[i] *= sample;
    }
    if (g.residual) {
#pragma unroll
      for (int i = 0; i < VEC; i++) v[i] += residual[i];
    }
    store<VEC>(static_cast<T*>(g.y) + at, v);
  }
}

template <class T, int VEC>
__global__ void __launch_bounds__(kRowWarps * 32)
    activation_backward_kernel(const __grid_constant__ ActivationBackward g) {
  const RowTile<VEC> tile(g.width);
  if (tile.column >= g.width) return;
  for (int64_t row = tile.row; row < g.rows; row += tile.row_step) {
    const int64_t at = row * g.width + tile.column;
    float dy[VEC], v[VEC];
    load<VEC>(static_cast<const T*>(g.dy) + row * g.dy_stride + tile.column, dy);
    load<VEC>(static_cast<const T*>(g.preact) + at, v);
    activation_slope(v, g.activation);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] *= dy[i];
    store<VEC>(static_cast<T*>(g.dpreact) + at, v);
  }
}

}  // namespace fastvit::cuda
