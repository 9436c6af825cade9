// exp and the activations on vectors. Included inside the namespace of an instruction set, after simd.h.

// Cephes' expf: argument reduction in two parts, degree 7, about one unit in the last place. Denormal results are kept.
FASTVIT_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x = x > 89.0f ? V{} + 89.0f : x;
  x = x < -105.0f ? V{} - 105.0f : x;
  V rounder = V{} + 12582912.0f;
  V shifted = fma(x, V{} + 1.44269504088896341f, rounder);
  V n = shifted - rounder;
  V r = fma(n, V{} - 0.693359375f, x);
  r = fma(n, V{} + 2.12194440e-4f, r);
  V p = V{} + 1.9875691500e-4f;
  p = fma(p, r, V{} + 1.3981999507e-3f);
  p = fma(p, r, V{} + 8.3334519073e-3f);
  p = fma(p, r, V{} + 4.1665795894e-2f);
  p = fma(p, r, V{} + 1.6666665459e-1f);
  p = fma(p, r, V{} + 5.0000001201e-1f);
  p = fma(p, r * r, r + 1.0f);
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
  return _mm512_scalef_ps(p, n);
#else
  // 2^n in two halves: n reaches -151 and +128, beyond the exponents of a float.
  VecI exponent = bit_cast<VecI>(shifted) - 0x4b400000;
  VecI half = exponent >> 1;
  V first = bit_cast<V>((half + 127) << 23);
  V second = bit_cast<V>((exponent - half + 127) << 23);
  return p * first * second;
#endif
}

template <class F>
FASTVIT_INLINE Vec<double> per_lane(Vec<double> x, F f) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = f(x[i]);
  return x;
}

FASTVIT_INLINE Vec<double> exp(Vec<double> x) {
  return per_lane(x, [](double v) { return ::exp(v); });
}

template <class A>
FASTVIT_INLINE Vec<A> sigmoid_times(Vec<A> x, Vec<A> argument) {
  return x / (exp(-argument) + A(1));
}

// 1 / x of a normal number, right to rounding but for the last bit.
FASTVIT_INLINE Vec<float> reciprocal(Vec<float> x) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
  const Vec<float> r = _mm512_rcp14_ps(x);
  return fma(r, fma(-x, r, Vec<float>{} + 1.0f), r);
#else
  return 1.0f / x;
#endif
}

// x Phi(x) through the upper tail Q(t) = exp(-t^2/2) R(t), t = |x|, so that the relative error stays at fp32 rounding
// where Phi itself vanishes. (t + 2.5) R(t) is a polynomial in (t - 2.5) / (t + 2.5), minimax to 1.5e-8 on [0, 14.5].
// Beyond t = 12.9 the tail is close to the denormals, which cost three times as much: it is 0 from there on.
constexpr float kGeluEnd = 12.9f;

FASTVIT_INLINE Vec<float> magnitude(Vec<float> x) { return bit_cast<Vec<float>>(bit_cast<VecU>(x) & 0x7fffffffu); }

// Q(t), and exp(-t^2/2), of t >= 0.
FASTVIT_INLINE Vec<float> upper_tail(Vec<float> t, Vec<float>& bell) {
  using V = Vec<float>;
  V bounded = t > kGeluEnd ? V{} + kGeluEnd : t;
  V inverse = reciprocal(bounded + 2.5f);
  V q = (bounded - 2.5f) * inverse;
  V p = V{} - 0.00015726718993391842f;
  p = fma(p, q, V{} - 0.0003108656092081219f);
  p = fma(p, q, V{} + 0.0006843447918072343f);
  p = fma(p, q, V{} + 0.0025232979096472263f);
  p = fma(p, q, V{} - 0.0016009609680622816f);
  p = fma(p, q, V{} - 0.016386020928621292f);
  p = fma(p, q, V{} + 0.009235914796590805f);
  p = fma(p, q, V{} + 0.13198696076869965f);
  p = fma(p, q, V{} - 0.43369200825691223f);
  p = fma(p, q, V{} + 0.7066566348075867f);
  V square = bounded * bounded;
  V lost = fma(bounded, bounded, -square);
  bell = exp(square * -0.5f) * fma(lost, V{} - 0.5f, V{} + 1.0f);
  return t > kGeluEnd ? V{} : bell * p * inverse;
}

FASTVIT_INLINE Vec<float> gelu(Vec<float> x) {
  Vec<float> bell;
  const Vec<float> t = magnitude(x), small = t * upper_tail(t, bell);
  // inf * 0 must not appear for +inf (it must for -inf, as in eager).
  return x > kGeluEnd ? x : (x >= 0.0f ? x - small : -small);
}

// Its derivative, Phi(x) + x phi(x).
FASTVIT_INLINE Vec<float> gelu_slope(Vec<float> x) {
  Vec<float> bell;
  const Vec<float> t = magnitude(x), tail = upper_tail(t, bell);
  const Vec<float> rest = tail - t * bell * 0.398942280401432678f;
  return t > kGeluEnd ? (x > 0.0f ? Vec<float>{} + 1.0f : Vec<float>{}) : (x >= 0.0f ? 1.0f - rest : rest);
}

FASTVIT_INLINE Vec<double> gelu(Vec<double> x) {
  return per_lane(x, [](double v) { return 0.5 * v * ::erfc(-v * 0.70710678118654752440); });
}

FASTVIT_INLINE Vec<double> gelu_slope(Vec<double> x) {
  return per_lane(x, [](double v) {
    return 0.5 * ::erfc(-v * 0.70710678118654752440) + v * ::exp(-0.5 * v * v) * 0.398942280401432678;
  });
}

template <class A>
FASTVIT_INLINE Vec<A> activate(Vec<A> x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      // (1 + tanh u) / 2 = sigmoid(2u)
      return sigmoid_times<A>(x, A(1.5957691216057308) * (x + A(0.044715) * x * x * x));
    case Activation::quick_gelu:
      return sigmoid_times<A>(x, A(1.702) * x);
    default:
      return x;
  }
}

// activation(x), and its derivative.
template <class A>
FASTVIT_INLINE Vec<A> activate_with_slope(Vec<A> x, Activation activation, Vec<A>& slope) {
  const bool tanh = activation == Activation::gelu_tanh;
  if (activation == Activation::gelu) {
    slope = gelu_slope(x);
    return gelu(x);
  }
  if (activation == Activation::none) {
    slope = Vec<A>{} + A(1);
    return x;
  }
  const Vec<A> square = x * x;
  const Vec<A> argument = tanh ? A(1.5957691216057308) * (x + A(0.044715) * square * x) : A(1.702) * x;
  const Vec<A> gate = sigmoid_times<A>(Vec<A>{} + A(1), argument);
  const Vec<A> inner = tanh ? A(1.5957691216057308) * (A(1) + A(3 * 0.044715) * square) : Vec<A>{} + A(1.702);
  slope = gate * (A(1) + x * inner * (A(1) - gate));
  return x * gate;
}

// The same functions for a result that is rounded to C.
template <class C>
struct Rounded {
  // exp(scale * x - shift)
  FASTVIT_INLINE static Vec<C> exp_of(Vec<C> x, C scale, C shift) {
    return exp(fma(x, Vec<C>{} + scale, Vec<C>{} - shift));
  }
  FASTVIT_INLINE static Vec<C> activated(Vec<C> x, Activation activation) { return activate<C>(x, activation); }
};

#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
template <>
struct Rounded<bfloat16> {
  // To 3e-6, by 2^n times a polynomial of degree 4.
  FASTVIT_INLINE static Vec<float> exp_of(Vec<float> x, float scale, float shift) {
    using V = Vec<float>;
    constexpr float kLog2E = 1.44269504088896341f;
    const V e = fma(x, V{} + scale * kLog2E, V{} - shift * kLog2E), f = _mm512_reduce_ps(e, 0);
    V p = fma(V{} + 0.00957090686f, f, V{} + 0.0559178963f);
    p = fma(p, f, V{} + 0.240247205f);
    p = fma(p, f, V{} + 0.69312191f);
    p = fma(p, f, V{} + 0.99999928f);
    return _mm512_scalef_ps(p, e - f);
  }
  // x Phi(x) with Phi by an odd polynomial, minimax to 2.5e-5 in the product, 0 and 1 beyond 4.4.
  FASTVIT_INLINE static Vec<float> activated(Vec<float> x, Activation activation) {
    using V = Vec<float>;
    if (activation != Activation::gelu) return activate<float>(x, activation);
    // The other way round these two would lose NaN.
    const V low = _mm512_max_ps(V{} - 4.4f, x), t = _mm512_min_ps(low, V{} + 4.4f), square = t * t;
    V p = fma(V{} + 3.56908517e-11f, square, V{} - 3.75374576e-09f);
    p = fma(p, square, V{} + 1.74073548e-07f);
    p = fma(p, square, V{} - 4.7246449e-06f);
    p = fma(p, square, V{} + 8.42903974e-05f);
    p = fma(p, square, V{} - 0.00105497427f);
    p = fma(p, square, V{} + 0.00964295678f);
    p = fma(p, square, V{} - 0.0660762936f);
    p = fma(p, square, V{} + 0.398761511f);
    return low * fma(t, p, V{} + 0.5f);
  }
};
#endif
