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

// y of the rows [row, row + count).
template <class T>
FASTVIT_INLINE void epilogue_tile(const GemmArgs<T>& g, int64_t row, int64_t count, int64_t first,
                                  const accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  for (const int64_t end = row + count; row < end; row++, sums += kPanel<A>) {
    Vec<A> v[kPanelVectors];
    preactivation(g, row, first, sums, v);
    const T* residual = g.residual ? g.residual + row % g.residual_period * g.residual_stride : nullptr;
    T* y = g.y + (row + (row / g.group + 1) * g.gap) * g.y_stride;
    int64_t column = first;
    for (int j = 0; j < kPanelVectors && column < g.n; j++, column += kLanes<A>) {
      const int64_t n = g.n - column;
      v[j] = activate<A>(v[j], g.activation);
      if (g.layer_scale) v[j] *= load(g.layer_scale + column, n);
      if (residual) v[j] += load(residual + column, n);
      store(y + column, v[j], n);
    }
  }
}

// The panels of a weight: those it came with, or its own.
template <class T>
class Weight {
 public:
  using C = compute_t<T>;
  using A = unit_t<C>;
  explicit Weight(const GemmArgs<T>& g)
      : size_(units_of<C>(g.k) * kPanel<C>),
        memory_(g.panels ? 0 : panels_of<C>(g.n) * size_ * sizeof(A)),
        data_(g.panels ? static_cast<const A*>(g.panels) : memory_.as<A>()) {
    if (g.panels) return;
    parallel_for(panels_of<C>(g.n), 65536 / (size_ + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++)
        if (g.weight_by_columns)
          pack_panel_by_columns<C>(g.weight, g.weight_stride, p * kPanel<C>, g.n, g.k, memory_.as<A>() + p * size_);
        else
          pack_panel<C>(g.weight, g.weight_stride, p * kPanel<C>, g.n, g.k, memory_.as<A>() + p * size_);
    });
  }
  const A* panel(int64_t p) const { return data_ + p * size_; }

 private:
  int64_t size_;
  Scratch memory_;
  const A* data_;
};
