// LayerNorm of one row. Included inside the namespace of an instruction set, after simd.h.

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

// The statistics of a row, and its normalised elements a vector at a time; weight and bias may be null.
template <class T, class P = T>
struct Normaliser {
  using A = accumulator_t<T>;
  const T* row;
  int64_t width;
  const P *weight, *bias;
  A mean, shift, rstd;

  FASTVIT_INLINE Normaliser(const T* z, int64_t d, double eps, const P* w, const P* b)
      : row(z), width(d), weight(w), bias(b) {
    A total, unused, remainder, squares;
    reduce<A>(d, total, unused, [&](int64_t i, int64_t n, Vec<A>& a, Vec<A>&) { a += load(z + i, n); });
    mean = total / A(d);
    reduce<A>(d, remainder, squares, [&](int64_t i, int64_t n, Vec<A>& a, Vec<A>& b) {
      Vec<A> centred = load(z + i, n) - mean;
      if (n < kLanes<A>) centred = fill_beyond<A>(centred, n, 0);
      a += centred;
      b += centred * centred;
    });
    // What rounding took from the mean is given back, so that rows far from zero keep their variance.
    shift = remainder / A(d);
    const A variance = squares / A(d) - shift * shift;
    rstd = A(1) / std::sqrt((variance > A(0) || variance != variance ? variance : A(0)) + A(eps));
  }

  // The elements from i on; what lies beyond the row is zero.
  FASTVIT_INLINE Vec<A> operator()(int64_t i) const {
    const int64_t n = width - i;
    if (n <= 0) return Vec<A>{};
    Vec<A> v = ((load(row + i, n) - mean) - shift) * rstd;
    if (weight) v *= load(weight + i, n);
    if (bias) v += load(bias + i, n);
    return n < kLanes<A> ? fill_beyond<A>(v, n, 0) : v;
  }
};
