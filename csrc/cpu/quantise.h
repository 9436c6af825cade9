// Rows as unsigned bytes, x ~ low + step * byte, each row with a range of its own. Included inside the namespace of an
// instruction set, after micro.h.

struct RowRange {
  float step, low;
};

// The bytes of a row's k elements as lines `line_step` units apart.
template <class S>
RowRange quantise_row(const S* row, int64_t k, int32_t* lines, int64_t line_step) {
  constexpr int64_t lanes = kLanes<float>, line = kLine<int8_t>;
  const float any = load(row, 1)[0];
  Vec<float> low[2] = {Vec<float>{} + any, Vec<float>{} + any}, high[2] = {low[0], low[0]};
  int64_t i = 0;
  for (; i + 2 * lanes <= k; i += 2 * lanes)
    for (int j = 0; j < 2; j++) {
      const Vec<float> v = load(row + i + j * lanes);
      low[j] = v < low[j] ? v : low[j];
      high[j] = v > high[j] ? v : high[j];
    }
  float least = -max_of<float>(larger<float>(-low[0], -low[1])), most = max_of<float>(larger<float>(high[0], high[1]));
  for (; i < k; i++) {
    const float x = load(row + i, 1)[0];
    least = x < least ? x : least;
    most = x > most ? x : most;
  }
  const float step = (most - least) / 255.0f, inverse = step > 0.0f ? 1.0f / step : 0.0f;
  for (int64_t begin = 0; begin < k; begin += line, lines += line_step)
    for (int64_t part = 0; part < line; part += lanes) {
      const int64_t at = begin + part;
      const Vec<float> v = at < k ? (load(row + at, k - at) - least) * inverse : Vec<float>{};
      store_bytes(reinterpret_cast<uint8_t*>(lines) + part, v);
    }
  // A row that is not finite stays so.
  return {step, least - least == 0.0f && most - most == 0.0f ? least : least - most};
}
