// What happens to the sums of a product before they are stored, and where its operands come from. Included inside the
// namespace of an instruction set, after product.h.

// sums + bias of kPanel columns, kept as preact where that is asked for; zero beyond the last column.
template <class T>
FASTVIT_INLINE void preactivation(const GemmArgs<T>& g, int64_t row, int64_t column, const accumulator_t<T>* sums,
                                  Vec<accumulator_t<T>>* v) {
  using A = accumulator_t<T>;
  for (int j = 0; j < kPanelVectors; j++, column += kLanes<A>, sums += kLanes<A>) {
    const int64_t n = g.n - column;
    v[j] = Vec<A>{};
    if (n <= 0) continue;
    v[j] = load(sums);
    if (g.bias) v[j] += load(g.bias + column, n);
    if (g.preact) store(g.preact + row * g.preact_stride + column, v[j], n);
  }
}

template <class T>
FASTVIT_INLINE void epilogue_row(const GemmArgs<T>& g, int64_t row, int64_t column, const accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  Vec<A> v[kPanelVectors];
  preactivation(g, row, column, sums, v);
  const T* residual = g.residual ? g.residual + row % g.residual_period * g.residual_stride : nullptr;
  T* y = g.y + (row + (row / g.group + 1) * g.gap) * g.y_stride;
  for (int j = 0; j < kPanelVectors; j++, column += kLanes<A>) {
    const int64_t n = g.n - column;
    if (n <= 0) return;
    v[j] = activate<A>(v[j], g.activation);
    if (g.layer_scale) v[j] *= load(g.layer_scale + column, n);
    if (residual) v[j] += load(residual + column, n);
    store(y + column, v[j], n);
  }
}

// Writes a row of k numbers as lines; numbers(i) is the vector from i on, zero beyond k.
template <class C, class F>
FASTVIT_INLINE void put_line(unit_t<C>* lines, const Tiles& tiles, int64_t tile, int64_t i, int64_t k,
                             const F& numbers) {
  using A = unit_t<C>;
  constexpr int64_t lanes = kLanes<A>, per_unit = Units<C>::kPerUnit;
  A* dst = lines + tiles.begin(tile) * row_units<C>(k) + i * lanes;
  for (int64_t begin = 0; begin < k; begin += kLine<C>, dst += tiles.height(tile) * lanes) {
    Vec<A> v[per_unit];
    for (int j = 0; j < per_unit; j++) v[j] = numbers(begin + j * lanes);
    store(dst, Units<C>::from(v));
  }
}

// Writes kPanel columns of a row of a product as part of the lines of the next one.
template <class C>
FASTVIT_INLINE void put_panel(unit_t<C>* lines, const Tiles& tiles, int64_t row, int64_t column, int64_t k,
                              const Vec<unit_t<C>>* v) {
  using A = unit_t<C>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t tile = tiles.tile_of(row), height = tiles.height(tile);
  A* dst = lines + tiles.begin(tile) * row_units<C>(k) + (row - tiles.begin(tile)) * lanes;
  static_assert(kPanel<C> % kLine<C> == 0);
  for (int j = 0; j < kPanelVectors && column < k; j += Units<C>::kPerUnit, column += kLine<C>)
    store(dst + column / kLine<C> * height * lanes, Units<C>::from(v + j));
}

// The panels of a weight: those it came with, or its own.
template <class T>
class PackedWeight {
 public:
  using C = compute_t<T>;
  using A = unit_t<C>;
  explicit PackedWeight(const GemmArgs<T>& g)
      : size_(units_of<C>(g.k) * kPanel<C>),
        memory_(g.panels ? 0 : panels_of<C>(g.n) * size_ * sizeof(A)),
        data_(g.panels ? static_cast<const A*>(g.panels) : memory_.as<A>()) {
    if (g.panels) return;
    parallel_for(panels_of<C>(g.n), 65536 / (size_ + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++)
        pack_panel<C>(g.weight, g.weight_stride, p * kPanel<C>, g.n, g.k, memory_.as<A>() + p * size_);
    });
  }
  const A* panel(int64_t p) const { return data_ + p * size_; }

 private:
  int64_t size_;
  Scratch memory_;
  const A* data_;
};

// Rows cut into groups. Enough rows: every thread has groups of its own, few of them big enough to make the weights'
// way worth while. Few rows: all threads share each group.
template <class C>
struct Groups {
  int64_t m, count, rows;
  Groups(int64_t total, int64_t k, double share) : m(total) {
    const int64_t threads = thread_count(), limit = group_rows<C>(k, share);
    const bool shared = m < threads * 2 * kTileRows;
    count = shared ? (m + limit - 1) / limit : (m + threads * limit - 1) / (threads * limit) * threads;
    rows = (m + count - 1) / count;
  }
  int64_t begin(int64_t group) const { return m * group / count; }
};
