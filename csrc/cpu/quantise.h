// Rows as unsigned bytes, x ~ low + step * byte, each row with a range of its own. Included inside the namespace of an
// instruction set, after micro.h.

struct RowRange {
  float step, low;
};

// The bits of floating-point numbers as signed integers of the same order, and back again. What is not finite lies
// outside of all the others, so that an extreme never loses it.
template <class Bits, class V>
FASTVIT_INLINE V in_order(V bits) {
  constexpr int sign = 8 * sizeof(Bits) - 1;
  return bits ^ (bits >> sign & static_cast<Bits>((int64_t{1} << sign) - 1));
}

// The bytes of a row's k elements as lines `line_step` units apart. A row that is not finite has no range.
template <class S>
RowRange quantise_row(const S* row, int64_t k, int32_t* lines, int64_t line_step) {
  using Bits = std::conditional_t<sizeof(S) == 2, int16_t, int32_t>;
  typedef Bits V __attribute__((vector_size(FASTVIT_VECTOR_BYTES)));
  constexpr int64_t lanes = kLanes<float>, line = kLine<int8_t>, count = sizeof(V) / sizeof(Bits), chains = 2;
  S some[count];
  for (S& number : some) number = row[0];
  V least[chains], most[chains];
  for (int j = 0; j < chains; j++) least[j] = most[j] = in_order<Bits>(load_bits<V>(some));
  const auto extend = [&](const S* p, int j) __attribute__((always_inline)) {
    const V v = in_order<Bits>(load_bits<V>(p));
    least[j] = v < least[j] ? v : least[j];
    most[j] = v > most[j] ? v : most[j];
  };
  int64_t i = 0;
  for (; i + chains * count <= k; i += chains * count)
    for (int j = 0; j < chains; j++) extend(row + i + j * count, j);
  for (; i + count <= k; i += count) extend(row + i, 0);
  std::memcpy(some, row + i, (k - i) * sizeof(S));
  extend(some, 0);
  Vec<float> low = Vec<float>{} + INFINITY, high = -low, check{};
  for (const bool is_most : {false, true})
    for (int j = 0; j < chains; j++) {
      const V numbers = in_order<Bits>(is_most ? most[j] : least[j]);
      std::memcpy(some, &numbers, sizeof(numbers));
      for (int64_t at = 0; at < count; at += lanes) {
        const Vec<float> v = load(some + at);
        low = v < low ? v : low;
        high = v > high ? v : high;
        check += v * 0.0f;
      }
    }
  const float bottom = -max_of<float>(-low), step = (max_of<float>(high) - bottom) / 255.0f;
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
  const auto byte_of = [&](Vec<float> v) __attribute__((always_inline)) { return (v - bottom) * inverse; };
  int64_t begin = 0;
  for (; begin + line <= k; begin += line, lines += line_step) {
    Vec<float> v[4];
    for (int part = 0; part < 4; part++) v[part] = byte_of(load(row + begin + part * lanes));
    store_bytes(reinterpret_cast<uint8_t*>(lines), v);
  }
  if (begin < k) {
    Vec<float> v[4] = {};
    for (int part = 0; part < 4 && begin + part * lanes < k; part++)
      v[part] = byte_of(load(row + begin + part * lanes, k - begin - part * lanes));
    store_bytes(reinterpret_cast<uint8_t*>(lines), v);
  }
  return {step, sum_of<float>(check) == 0.0f ? bottom : NAN};
}
