#include "cpu/simd.h"

// Adds the rows [begin, end) of the columns [first, last) to out.
template <class T>
void add_rows(const T* x, int64_t stride, int64_t begin, int64_t end, int64_t first, int64_t last,
              accumulator_t<T>* out) {
  constexpr int lanes = kLanes<accumulator_t<T>>;
  for (int64_t i = first; i < last; i += 4 * lanes) {
    Vec<accumulator_t<T>> sum[4] = {};
    for (int64_t row = begin; row < end; row++)
      for (int j = 0; j < 4; j++)
        if (i + j * lanes < last) sum[j] += load(x + row * stride + i + j * lanes, last - i - j * lanes);
    for (int j = 0; j < 4; j++) {
      const int64_t at = i + j * lanes;
      if (at < last) store(out + at, load(out + at, last - at) + sum[j], last - at);
    }
  }
}
