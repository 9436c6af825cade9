#pragma once

#include <cstdint>

namespace fastvit {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// The type in which sums over T are kept.
template <class T>
struct Accumulator {
  using type = float;
};

template <>
struct Accumulator<double> {
  using type = double;
};

template <class T>
using accumulator_t = typename Accumulator<T>::type;

}  // namespace fastvit
