// Rows as unsigned bytes, x ~ low + step * byte, each row with a range of its own. Included inside the namespace of an
// instruction set, after micro.h.

struct RowRange {
  float step, low;
};

// The bytes of a row's k elements as lines `line_step` units apart. A row that is not finite has no range.
template <class S>
RowRange quantise_row(const S* row, int64_t k, int32_t* lines, int64_t line_step) {
  constexpr int64_t lanes = kLanes<float>, line = kLine<int8_t>;
  const float any = load(row, 1)[0];
  Vec<float> least = Vec<float>{} + any, most = least, check{};
  for (int64_t i = 0; i < k; i += lanes) {
    const Vec<float> v = i + lanes <= k ? load(row + i) : fill_beyond<float>(load(row + i, k - i), k - i, any);
    least = v < least ? v : least;
    most = v > most ? v : most;
    check += v * 0.0f;
  }
  const float low = -max_of<float>(-least), step = (max_of<float>(most) - low) / 255.0f;
  const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
  for (int64_t begin = 0; begin < k; begin += line, lines += line_step)
    for (int64_t part = 0; part < line; part += lanes) {
      const int64_t at = begin + part;
      const Vec<float> v = at < k ? (load(row + at, k - at) - low) * inverse : Vec<float>{};
      store_bytes(reinterpret_cast<uint8_t*>(lines) + part, v);
    }
  return {step, sum_of<float>(check) == 0.0f ? low : NAN};
}
