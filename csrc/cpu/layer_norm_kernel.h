#include "cpu/simd.h"
#include "cpu/normalise.h"

template <class T, class Y>
void layer_norm_rows(const LayerNormArgs<T, Y>& args, int64_t begin, int64_t end) {
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
    const Normaliser<T> normalise(z, width, args.eps, args.weight, args.bias);
    if (args.mean) args.mean[row] = normalise.mean + normalise.shift;
    if (args.rstd) args.rstd[row] = normalise.rstd;
    Y* y = args.y + row * args.y_stride;
    for (int64_t i = 0; i < width; i += lanes) store(y + i, normalise(i), width - i);
  }
}
