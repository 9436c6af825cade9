#include "cpu/simd.h"

template <class T, class Pixel>
FASTVIT_INLINE void gather_run(const Pixel* src, int64_t step, int64_t count, bool affine, accumulator_t<T> scale,
                               accumulator_t<T> shift, T* dst) {
  using A = accumulator_t<T>;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t n = count - i < kLanes<A> ? count - i : kLanes<A>;
    Vec<A> v{};
    if constexpr (sizeof(Pixel) == 1) {
      A lanes[kLanes<A>] = {};
      for (int64_t j = 0; j < n; j++) lanes[j] = A(src[(i + j) * step]);
      v = load(lanes);
    } else if (step == 1) {
      v = load(src + i, n);
    } else {
      Pixel lanes[kLanes<A>] = {};
      for (int64_t j = 0; j < n; j++) lanes[j] = src[(i + j) * step];
      v = load(lanes);
    }
    store(dst + i, affine ? v * scale + shift : v, n);
  }
}

// Patches [begin, end) of all images, one row of C x P x Q pixels each, as the convolution's weight has them.
template <class T>
void gather_patches(const PatchArgs<T>& g, int64_t begin, int64_t end) {
  const int64_t per_image = g.rows * g.columns, size = g.channels * g.patch_height * g.patch_width;
  for (int64_t patch = begin; patch < end; patch++) {
    const int64_t row = patch % per_image / g.columns, column = patch % g.columns;
    const int64_t origin =
        patch / per_image * g.strides[0] + row * g.patch_height * g.strides[2] + column * g.patch_width * g.strides[3];
    T* dst = g.patches + (patch - begin) * size;
    for (int64_t c = 0; c < g.channels; c++)
      for (int64_t p = 0; p < g.patch_height; p++, dst += g.patch_width) {
        const int64_t offset = origin + c * g.strides[1] + p * g.strides[2];
        const float scale = g.scale ? g.scale[c] : 1.0f, shift = g.shift ? g.shift[c] : 0.0f;
        if (g.bytes)
          gather_run<T>(static_cast<const uint8_t*>(g.image) + offset, g.strides[3], g.patch_width, true, scale, shift,
                        dst);
        else
          gather_run<T>(static_cast<const T*>(g.image) + offset, g.strides[3], g.patch_width, g.scale != nullptr, scale,
                        shift, dst);
      }
  }
}

template <class T>
void prefix_tokens(const PrefixArgs<T>& g) {
  using A = accumulator_t<T>;
  for (int64_t b = 0; b < g.batch; b++)
    for (int64_t i = 0; i < g.count; i++)
      for (int64_t d = 0; d < g.width; d += kLanes<A>) {
        Vec<A> v = load(g.prefix + i * g.prefix_stride + d, g.width - d);
        if (g.positions) v += load(g.positions + i * g.positions_stride + d, g.width - d);
        store(g.y + (b * g.tokens + i) * g.width + d, v, g.width - d);
      }
}
