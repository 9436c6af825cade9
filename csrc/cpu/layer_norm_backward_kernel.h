#include "cpu/simd.h"
#include "cpu/normalise.h"

// The gradients of the rows [begin, end); what is summed over rows goes into sums, of 3 * width, which starts at 0.
template <class T, class G>
void layer_norm_gradients(const LayerNormBackwardArgs<T, G>& g, int64_t begin, int64_t end, accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>;
  const int64_t width = g.width;
  A *dweight = sums, *dbias = sums + width, *dlayer_scale = sums + 2 * width;
  for (int64_t row = begin; row < end; row++) {
    const G* dy = g.dy + row * g.dy_stride;
    const T* z = g.z + row * g.z_stride;
    const A mean = g.mean[row], rstd = g.rstd[row];
    A total, product;
    reduce<A>(width, total, product, [&](int64_t i, int64_t n, Vec<A>& a, Vec<A>& b) {
      const Vec<A> up = load(dy + i, n);
      Vec<A> normal = (load(z + i, n) - mean) * rstd;
      if (n < lanes) normal = fill_beyond<A>(normal, n, 0);
      store(dweight + i, load(dweight + i, n) + up * normal, n);
      store(dbias + i, load(dbias + i, n) + up, n);
      const Vec<A> scaled = g.weight ? up * load(g.weight + i, n) : up;
      a += scaled;
      b += scaled * normal;
    });
    const A average = total / A(width), slope = product / A(width);
    for (int64_t i = 0; i < width; i += lanes) {
      const int64_t n = width - i;
      const Vec<A> normal = (load(z + i, n) - mean) * rstd;
      Vec<A> d = load(dy + i, n);
      if (g.weight) d *= load(g.weight + i, n);
      d = (d - average - normal * slope) * rstd;
      if (g.dz) d += load(g.dz + row * g.dz_stride + i, n);
      store(g.d + row * width + i, d, n);
      if (g.layer_scale) {
        store(dlayer_scale + i, load(dlayer_scale + i, n) + d * load(g.x + row * g.x_stride + i, n), n);
        store(g.dx + row * width + i, d * load(g.layer_scale + i, n), n);
      }
    }
  }
}

template <class T>
void round_sums(const accumulator_t<T>* sums, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += kLanes<accumulator_t<T>>) store(out + i, load(sums + i, n - i), n - i);
}
