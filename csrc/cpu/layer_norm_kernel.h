#include "cpu/simd.h"

// Sums of f over the row in four independent chains.
template <class A, class F>
FASTVIT_INLINE void reduce(int64_t width, A& first, A& second, F f) {
  constexpr int lanes = kLanes<A>;
  Vec<A> a[4] = {}, b[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= width; i += 4 * lanes)
    for (int j = 0; j < 4; j++) f(i + j * lanes, int64_t{lanes}, a[j], b[j]);
  for (; i < width; i += lanes) f(i, width - i, a[0], b[0]);
  first = sum_of<A>((a[0] + a[1]) + (a[2] + a[3]));
  second = sum_of<A>((b[0] + b[1]) + (b[2] + b[3]));
}

template <class A>
FASTVIT_INLINE Vec<A> zero_beyond(Vec<A> v, int64_t n) {
  for (int64_t i = n; i < kLanes<A>; i++) v[i] = 0;
  return v;
}

template <class T>
void layer_norm_rows(const LayerNormArgs<T>& args, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>;
  const int64_t width = args.width;
  for (int64_t row = begin; row < end; row++) {
    const T* z = args.x + row * args.x_stride;
    if (args.residual) {
      const T* x = z;
      const T* residual = args.residual + row * args.residual_stride;
      T* sum = args.z + row * width;
      for (int64_t i = 0; i < width; i += lanes) {
        Vec<A> v = load(x + i, width - i);
        if (args.layer_scale) v *= load(args.layer_scale + i, width - i);
        store(sum + i, v + load(residual + i, width - i), width - i);
      }
      z = sum;
    }
    A total, unused, remainder, squares;
    reduce<A>(width, total, unused, [&](int64_t i, int64_t n, Vec<A>& a, Vec<A>&) { a += load(z + i, n); });
    const A mean = total / A(width);
    reduce<A>(width, remainder, squares, [&](int64_t i, int64_t n, Vec<A>& a, Vec<A>& b) {
      Vec<A> centred = load(z + i, n) - mean;
      if (n < lanes) centred = zero_beyond<A>(centred, n);
      a += centred;
      b += centred * centred;
    });
    // What rounding took from the mean is given back, so that rows far from zero keep their variance.
    const A shift = remainder / A(width);
    const A variance = squares / A(width) - shift * shift;
    const A rstd = A(1) / std::sqrt((variance > A(0) || variance != variance ? variance : A(0)) + A(args.eps));
    if (args.mean) args.mean[row] = mean + shift;
    if (args.rstd) args.rstd[row] = rstd;
    T* y = args.y + row * args.y_stride;
    for (int64_t i = 0; i < width; i += lanes) {
      const int64_t n = width - i;
      Vec<A> v = ((load(z + i, n) - mean) - shift) * rstd;
      if (args.weight) v *= load(args.weight + i, n);
      if (args.bias) v += load(args.bias + i, n);
      store(y + i, v, n);
    }
  }
}
