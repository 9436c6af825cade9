// Matrix products on packed operands. Included inside the namespace of an instruction set, after micro.h.

// A group of rows as lines: what one thread works on while it goes through the panels of a weight.
template <class C>
struct Lines {
  const unit_t<C>* data;
  Tiles tiles;
  int64_t k;
  int64_t begin = 0, end = tiles.count;  // the tiles that are meant

  const unit_t<C>* tile(int64_t t) const { return data + tiles.begin(t) * row_units<C>(k); }
};

// Rows of a group. Weights come from further away once per group: on a Zen 5, ViT-B at batch 8 in fp32 got faster until
// the lines took 2.4 times the L2 cache (70 % of the peak at half of it, 78 % at 0.8, 82 % at 1.2, 83 % at 2.4).
constexpr double kLinesPerCache = 2.4;
template <class C>
int64_t group_rows(int64_t k) {
  const int64_t fitting = static_cast<int64_t>(kLinesPerCache * l2_bytes()) / (row_units<C>(k) * sizeof(unit_t<C>) + 1);
  const int64_t tiles = fitting / kTileRows;
  return (tiles < 2 ? 2 : tiles > 16 ? 16 : tiles) * kTileRows;
}

template <class C>
int64_t sums_size(int64_t rows) {
  return (rows + kTileRows) * kPanel<C>;
}

// Begins to fetch, for writing, what an epilogue will touch: `bytes` of each row.
FASTVIT_INLINE void fetch_rows(const void* first, int64_t stride_bytes, int64_t rows, int64_t bytes) {
  const char* p = static_cast<const char*>(first);
  for (int64_t i = 0; i < rows; i++, p += stride_bytes)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 1, 3);
}

// One panel of a weight with the rows of a group; epilogue(tile, column, sums) gets kPanel sums of each row of a tile,
// and soon(tile, column) says beforehand that it will.
template <class C, class S, class E>
FASTVIT_INLINE void multiply_panel(const Lines<C>& x, const unit_t<C>* panel, int64_t column, int64_t columns,
                                   unit_t<C>* sums, const S& soon, const E& epilogue) {
  constexpr int64_t lanes = kLanes<unit_t<C>>, width = kPanel<C>;
  const int64_t units = units_of<C>(x.k), longest = longest_chain<C>(), chains = (units + longest - 1) / longest;
  const int64_t chain = ((units + chains - 1) / (chains ? chains : 1) + lanes - 1) / lanes * lanes;
  const TileUnit unit;
  int64_t begin = 0;
  do {
    const int64_t count = units - begin < chain ? units - begin : chain, bytes = count * width * sizeof(unit_t<C>);
    const unit_t<C>* b = panel + begin * width;
    const char* ahead = reinterpret_cast<const char*>(b) + bytes;
    for (int64_t t = x.begin; t < x.end; t++) {
      const int64_t height = x.tiles.height(t), row = x.tiles.begin(t);
      unit_t<C>* out = sums + row * width;
      const auto tile = columns - column > lanes ? micro_of<C, kPanelVectors>(height) : micro_of<C, 1>(height);
      const int64_t fetched = (t - x.begin) * count * 32;
      if (begin + count >= units) soon(t, column);
      tile(x.tile(t) + begin * height, b, width, count, out, width, begin > 0,
           fetched < bytes ? ahead + fetched : reinterpret_cast<const char*>(b));
      if (begin + count >= units) epilogue(t, column, out);
    }
    begin += count;
  } while (begin < units);
}

// kPanel columns of a result from `first` on; Full: all of them exist. A is what sums are kept in.
template <bool Full, class A>
struct Columns {
  int64_t first, n;
  FASTVIT_INLINE int64_t at(int j) const { return first + j * kLanes<A>; }
  FASTVIT_INLINE int64_t left(int j) const { return Full ? kLanes<A> : n - at(j); }
  // Vector j of a row, zero beyond its end.
  template <class T>
  FASTVIT_INLINE Vec<A> of(const T* row, int j) const {
    return left(j) > 0 ? load(row + at(j), left(j)) : Vec<A>{};
  }
  // Writes the vectors of a row.
  template <class T>
  FASTVIT_INLINE void put(T* row, const Vec<A>* v) const {
    if constexpr (Full && std::is_same_v<compute_t<T>, bfloat16>)
      store(reinterpret_cast<A*>(row + first), Units<T>::from(v));
    else
      for (int j = 0; j < kPanelVectors && left(j) > 0; j++) store(row + at(j), v[j], left(j));
  }
};

template <class A, class F>
FASTVIT_INLINE void with_columns(int64_t first, int64_t n, const F& f) {
  if (first + kPanelVectors * kLanes<A> <= n)
    f(Columns<true, A>{first, n});
  else
    f(Columns<false, A>{first, n});
}

// Rows cut into groups. Enough rows: every thread has groups of its own, few of them big enough to make the weights'
// way worth while. Few rows: all threads share each group.
template <class C>
struct Groups {
  int64_t m, count, rows;
  Groups(int64_t total, int64_t k) : m(total) {
    const int64_t threads = thread_count(), limit = group_rows<C>(k);
    const bool shared = m < threads * 2 * kTileRows;
    count = shared ? (m + limit - 1) / limit : (m + threads * limit - 1) / (threads * limit) * threads;
    rows = (m + count - 1) / count;
  }
  int64_t begin(int64_t group) const { return m * group / count; }
};

// Writes a row of k numbers as lines `step` apart; numbers(i) is the vector from i on, zero beyond k.
template <class C, class F>
FASTVIT_INLINE void put_row(unit_t<C>* lines, int64_t step, int64_t k, const F& numbers) {
  constexpr int64_t lanes = kLanes<unit_t<C>>, per_unit = Units<C>::kPerUnit;
  for (int64_t begin = 0; begin < k; begin += kLine<C>, lines += step) {
    Vec<unit_t<C>> v[per_unit];
    for (int j = 0; j < per_unit; j++) v[j] = numbers(begin + j * lanes);
    store(lines, Units<C>::from(v));
  }
}

// Writes up to a vector of n numbers into a row of lines, from any column on.
template <class C>
FASTVIT_INLINE void put_run(unit_t<C>* lines, int64_t step, int64_t column, int64_t n, Vec<unit_t<C>> v) {
  constexpr int64_t lanes = kLanes<unit_t<C>>, line = kLine<C>;
  const int64_t within = column % line, left = line - within;
  C* const p = reinterpret_cast<C*>(lines + column / line * step);
  n = n < lanes ? n : lanes;
  if (n <= left) return store(p + within, v, n);
  C numbers[lanes];
  store(numbers, v);
  std::memcpy(p + within, numbers, left * sizeof(C));
  std::memcpy(lines + (column / line + 1) * step, numbers + left, (n - left) * sizeof(C));
}

// Writes kPanel columns of a product's tile as part of the lines of the next one; numbers(i, v) sets those of row i.
template <class C, class F>
FASTVIT_INLINE void put_panel(unit_t<C>* lines, const Tiles& tiles, int64_t t, int64_t column, int64_t k,
                              const F& numbers) {
  constexpr int64_t lanes = kLanes<unit_t<C>>;
  static_assert(kPanel<C> % kLine<C> == 0);
  const int64_t height = tiles.height(t);
  unit_t<C>* dst = lines + tiles.begin(t) * row_units<C>(k) + column / kLine<C> * height * lanes;
  for (int64_t i = 0; i < height; i++, dst += lanes) {
    Vec<unit_t<C>> v[kPanelVectors];
    numbers(i, v);
    for (int j = 0; j < kPanel<C> / kLine<C> && column + j * kLine<C> < k; j++)
      store(dst + j * height * lanes, Units<C>::from(v + j * Units<C>::kPerUnit));
  }
}
