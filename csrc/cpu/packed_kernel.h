#include "cpu/simd.h"
#include "cpu/micro.h"

// Bytes of the panels of a weight (N, K).
template <class C>
int64_t panels_bytes(int64_t n, int64_t k) {
  return panels_of<C>(n) * kPanel<C> * units_of<C>(k) * sizeof(unit_t<C>);
}

// T is what the weight is stored as, P what it is computed with.
template <class P, class T>
void pack_panels(const T* weight, int64_t stride, int64_t n, int64_t k, void* panels) {
  using C = compute_t<P>;
  const int64_t size = units_of<C>(k) * kPanel<C>;
  parallel_for(panels_of<C>(n), 65536 / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      pack_panel<C>(weight, stride, p * kPanel<C>, n, k, static_cast<unit_t<C>*>(panels) + p * size);
  });
}

// The number that a panel's element holds: it came from a P, and an accumulator's type holds every one of them.
inline float exactly(float value, float) { return value; }
inline double exactly(double value, double) { return value; }
inline bfloat16 exactly(bfloat16 value, bfloat16) { return value; }
inline bfloat16 exactly(float value, bfloat16) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}

// The inverse of pack_panels for a weight stored as P, rows one after the other.
template <class P>
void unpack_panels(const void* panels, int64_t n, int64_t k, P* weight) {
  using C = compute_t<P>;
  constexpr int64_t per_unit = Units<C>::kPerUnit, width = kPanel<C>;
  const int64_t size = units_of<C>(k) * width * per_unit;
  parallel_for(panels_of<C>(n), 65536 / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      const C* panel = static_cast<const C*>(panels) + p * size;
      for (int64_t row = p * width; row < n && row < (p + 1) * width; row++)
        for (int64_t i = 0; i < k; i++)
          weight[row * k + i] = exactly(panel[(i / per_unit * width + row - p * width) * per_unit + i % per_unit], P{});
    }
  });
}

// Rows of a weight as signed bytes, each row with a step of its own.
template <class T>
void quantise_weight(const T* weight, int64_t stride, int64_t n, int64_t k, int8_t* bytes, float* step, float* sum) {
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* w = weight + row * stride;
      int8_t* out = bytes + row * k;
      Vec<float> most{}, check{};
      for (int64_t i = 0; i < k; i += kLanes<float>) {
        const Vec<float> v = load(w + i, k - i);
        most = larger<float>(larger<float>(v, -v), most);
        check += v * 0.0f;
      }
      if (sum_of<float>(check) != 0.0f) {  // a weight that is not finite has no byte: the whole channel is NaN
        std::memset(out, 0, k);
        step[row] = sum[row] = NAN;
        continue;
      }
      const float size = max_of<float>(most) / 127.0f, inverse = size > 0.0f ? 1.0f / size : 0.0f;
      int64_t total = 0;
      for (int64_t i = 0; i < k; i += kLanes<float>) {
        const Vec<float> v = load(w + i, k - i) * inverse;
        for (int64_t j = 0; j < kLanes<float> && i + j < k; j++)
          total += out[i + j] = static_cast<int8_t>(static_cast<int32_t>(v[j] + (v[j] < 0 ? -0.5f : 0.5f)));
      }
      step[row] = size;
      sum[row] = size * static_cast<float>(total);
    }
  });
}

// The panels of a weight that is bytes already.
inline void pack_bytes(const int8_t* bytes, int64_t n, int64_t k, void* panels) {
  const int64_t size = units_of<int8_t>(k) * kPanel<int8_t>;
  parallel_for(panels_of<int8_t>(n), 65536 / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      pack_panel<int8_t>(bytes, k, p * kPanel<int8_t>, n, k, static_cast<int32_t*>(panels) + p * size);
  });
}

inline int64_t packed_int8_bytes(int64_t n, int64_t k) { return panels_bytes<int8_t>(n, k); }

template <class P>
int64_t packed_bytes(int64_t n, int64_t k) {
  return panels_bytes<compute_t<P>>(n, k);
}
