#pragma once

// The inner functions that several CPU ops share. Each runs on the instruction set of active_isa().

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace fastvit {

// y = LN(z) with z = x, or z = residual + layer_scale * x rounded to T and written to z.
template <class T, class Y = T>
struct LayerNormArgs {
  using A = accumulator_t<T>;
  const T* x = nullptr;
  int64_t x_stride = 0;
  const T* residual = nullptr;
  int64_t residual_stride = 0;
  const T* layer_scale = nullptr;
  const T* weight = nullptr;
  const T* bias = nullptr;
  int64_t width = 0;
  double eps = 0;
  Y* y = nullptr;
  int64_t y_stride = 0;
  T* z = nullptr;     // contiguous rows
  A* mean = nullptr;  // may be null, as rstd
  A* rstd = nullptr;
};

template <class T, class Y>
void layer_norm_rows(const LayerNormArgs<T, Y>& args, int64_t begin, int64_t end);

// y = residual + layer_scale * activation(preact), preact = x weight^T + bias; x (M, K), weight (N, K), each with
// contiguous rows, or with contiguous columns: then they lie as (K, M) and (K, N). Under autocast the parameters (V)
// are wider than what is multiplied (T), and so is a residual stream (Y). Row r of the product is row r + (r / group +
// 1) * gap of y, and row r % residual_period of residual, which lets the patches of an image skip its prefix tokens and
// share one table of positions.
template <class T, class V = T, class Y = T>
struct GemmArgs {
  const T* x = nullptr;
  int64_t x_stride = 0;
  bool x_by_columns = false;
  const V* weight = nullptr;
  int64_t weight_stride = 0;
  bool weight_by_columns = false;
  const void* panels = nullptr;  // the weight as pack_weight left it, or null
  int64_t m = 0, n = 0, k = 0;
  const V* bias = nullptr;
  const V* layer_scale = nullptr;
  const Y* residual = nullptr;
  int64_t residual_stride = 0;
  int64_t residual_period = INT64_MAX;
  Activation activation = Activation::none;
  Y* preact = nullptr;
  int64_t preact_stride = 0;
  // In a backward pass: y = activation'(slope_at) * product, and activation(slope_at) as well.
  const Y* slope_at = nullptr;
  int64_t slope_at_stride = 0;
  Y* activated = nullptr;
  Y* y = nullptr;
  int64_t y_stride = 0;
  int64_t group = INT64_MAX;
  int64_t gap = 0;
};

template <class T, class V, class Y>
void gemm(const GemmArgs<T, V, Y>& args);

}  // namespace fastvit
