#pragma once

#include "common/activation.h"
#include "cuda/device.cuh"

namespace fastvit::cuda {

// x / (1 + exp(-argument))
__device__ inline float sigmoid_times(float x, float argument) {
  return __fdividef(x, 1.0f + exp2_fast(argument * -kLog2E));
}

// x Phi(x) through the upper tail Q(t) = exp(-t^2/2) R(t), t = |x|, so that the relative error stays small where Phi
// itself vanishes. (t + 2.5) R(t) is a polynomial in (t - 2.5) / (t + 2.5), minimax to 1.5e-8 on [0, 14.5].
constexpr float kGeluEnd = 12.9f;

// Q(t), and exp(-t^2/2), of t >= 0.
__device__ inline float upper_tail(float t, float& bell) {
  const float bounded = fminf(t, kGeluEnd);
  const float inverse = __fdividef(1.0f, bounded + 2.5f), q = (bounded - 2.5f) * inverse;
  float p = -0.00015726718993391842f;
  p = fmaf(p, q, -0.0003108656092081219f);
  p = fmaf(p, q, 0.0006843447918072343f);
  p = fmaf(p, q, 0.0025232979096472263f);
  p = fmaf(p, q, -0.0016009609680622816f);
  p = fmaf(p, q, -0.016386020928621292f);
  p = fmaf(p, q, 0.009235914796590805f);
  p = fmaf(p, q, 0.13198696076869965f);
  p = fmaf(p, q, -0.43369200825691223f);
  p = fmaf(p, q, 0.7066566348075867f);
  bell = exp2_fast(bounded * bounded * (-0.5f * kLog2E));
  return t > kGeluEnd ? 0.0f : bell * p * inverse;
}

__device__ inline float gelu(float x) {
  float bell;
  const float t = fabsf(x), small = t * upper_tail(t, bell);
  // inf * 0 must not appear for +inf (it must for -inf, as in eager).
  return x > kGeluEnd ? x : (x >= 0.0f ? x - small : -small);
}

// Phi(x) + x phi(x)
__device__ inline float gelu_slope(float x) {
  float bell;
  const float t = fabsf(x), tail = upper_tail(t, bell);
  const float rest = tail - t * bell * 0.398942280401432678f;
  return t > kGeluEnd ? (x > 0.0f ? 1.0f : 0.0f) : (x >= 0.0f ? 1.0f - rest : rest);
}

// (1 + tanh u) / 2 = sigmoid(2u)
__device__ inline float tanh_argument(float x) { return 1.5957691216057308f * (x + 0.044715f * x * x * x); }

// The derivative of x sigmoid(argument(x)).
__device__ inline float gated_slope(float x, float argument, float argument_slope) {
  const float gate = sigmoid_times(1.0f, argument);
  return gate * (1.0f + x * argument_slope * (1.0f - gate));
}

// The choice stands outside of the loops: all threads make the same one.
template <int VEC>
__device__ void activate(float (&v)[VEC], Activation activation) {
  if (activation == Activation::gelu) {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = gelu(v[i]);
  } else if (activation == Activation::gelu_tanh) {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = sigmoid_times(v[i], tanh_argument(v[i]));
  } else if (activation == Activation::quick_gelu) {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = sigmoid_times(v[i], 1.702f * v[i]);
  }
}

// v becomes activation'(v).
template <int VEC>
__device__ void activation_slope(float (&v)[VEC], Activation activation) {
  if (activation == Activation::gelu) {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = gelu_slope(v[i]);
  } else if (activation == Activation::gelu_tanh) {
#pragma unroll
    for (int i = 0; i < VEC; i++)
      v[i] = gated_slope(v[i], tanh_argument(v[i]), 1.5957691216057308f * (1.0f + 3 * 0.044715f * v[i] * v[i]));
  } else if (activation == Activation::quick_gelu) {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = gated_slope(v[i], 1.702f * v[i], 1.702f);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = 1.0f;
  }
}

}  // namespace fastvit::cuda
