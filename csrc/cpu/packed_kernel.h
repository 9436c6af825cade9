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

template <class P>
int64_t packed_bytes(int64_t n, int64_t k) {
  return panels_bytes<compute_t<P>>(n, k);
}
