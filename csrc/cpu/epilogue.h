// What happens to the sums of a product before they are stored, and where its operands come from. Included inside the
// namespace of an instruction set, after product.h.

// The end of a product for kPanel columns from `first` on; Full: all of them exist.
template <bool Full, class T, class V, class Y>
class Epilogue {
  using A = accumulator_t<T>;
  static constexpr int64_t kLanesA = kLanes<A>;

 public:
  FASTVIT_INLINE Epilogue(const GemmArgs<T, V, Y>& g, int64_t first) : g_(g), first_(first) {
    for (int j = 0; j < kPanelVectors; j++) {
      bias_[j] = g.bias && left(j) > 0 ? load(g.bias + column(j), left(j)) : Vec<A>{};
      scale_[j] = g.layer_scale && left(j) > 0 ? load(g.layer_scale + column(j), left(j)) : Vec<A>{};
    }
  }

  // sums + bias, kept as preact where that is asked for; zero beyond the last column.
  FASTVIT_INLINE void preactivation(int64_t row, const A* sums, Vec<A>* v) const {
    for (int j = 0; j < kPanelVectors; j++) {
      v[j] = Vec<A>{};
      if (left(j) <= 0) continue;
      v[j] = load(sums + j * kLanesA);
      if (g_.bias) v[j] += bias_[j];
      if (g_.preact) store(g_.preact + row * g_.preact_stride + column(j), v[j], left(j));
    }
  }

  // y of a row.
  FASTVIT_INLINE void finish(int64_t row, const A* sums) const {
    Vec<A> v[kPanelVectors];
    preactivation(row, sums, v);
    const bool repeats = g_.residual_period != INT64_MAX, gaps = g_.group != INT64_MAX;  // divisions are slow
    const Y* residual = g_.residual + (repeats ? row % g_.residual_period : row) * g_.residual_stride;
    Y* y = g_.y + (gaps ? row + (row / g_.group + 1) * g_.gap : row) * g_.y_stride;
    for (int j = 0; j < kPanelVectors && left(j) > 0; j++) {
      if (g_.slope_at) {
        Vec<A> slope;
        const Vec<A> at = load(g_.slope_at + row * g_.slope_at_stride + column(j), left(j));
        store(g_.activated + row * g_.n + column(j), activate_with_slope<A>(at, g_.activation, slope), left(j));
        v[j] *= slope;
      } else {
        v[j] = activate<A>(v[j], g_.activation);
      }
      if (g_.layer_scale && g_.residual)
        v[j] = fma(v[j], scale_[j], load(residual + column(j), left(j)));
      else if (g_.layer_scale)
        v[j] *= scale_[j];
      else if (g_.residual)
        v[j] += load(residual + column(j), left(j));
      store(y + column(j), v[j], left(j));
    }
  }

 private:
  FASTVIT_INLINE int64_t column(int j) const { return first_ + j * kLanesA; }
  FASTVIT_INLINE int64_t left(int j) const { return Full ? kLanesA : g_.n - column(j); }

  const GemmArgs<T, V, Y>& g_;
  int64_t first_;
  Vec<A> bias_[kPanelVectors], scale_[kPanelVectors];
};

// f(epilogue) for the columns from `first` on.
template <class T, class V, class Y, class F>
FASTVIT_INLINE void with_epilogue(const GemmArgs<T, V, Y>& g, int64_t first, const F& f) {
  if (first + kPanel<compute_t<T>> <= g.n)
    f(Epilogue<true, T, V, Y>(g, first));
  else
    f(Epilogue<false, T, V, Y>(g, first));
}

// y of the rows [row, row + count).
template <class T, class V, class Y>
FASTVIT_INLINE void epilogue_tile(const GemmArgs<T, V, Y>& g, int64_t row, int64_t count, int64_t first,
                                  const accumulator_t<T>* sums) {
  with_epilogue(g, first, [&](const auto& epilogue) {
    for (int64_t i = 0; i < count; i++) epilogue.finish(row + i, sums + i * kPanel<compute_t<T>>);
  });
}

// Begins to fetch what epilogue_tile touches.
template <class T, class V, class Y>
FASTVIT_INLINE void fetch_tile(const GemmArgs<T, V, Y>& g, int64_t row, int64_t count, int64_t column) {
  const int64_t bytes = kPanel<compute_t<T>> * sizeof(Y);
  if (g.gap == 0) fetch_rows(g.y + row * g.y_stride + column, g.y_stride * sizeof(Y), count, bytes);
  if (g.preact) fetch_rows(g.preact + row * g.preact_stride + column, g.preact_stride * sizeof(Y), count, bytes);
  if (g.residual && g.residual_period == INT64_MAX)
    fetch_rows(g.residual + row * g.residual_stride + column, g.residual_stride * sizeof(Y), count, bytes);
  if (g.slope_at) {
    fetch_rows(g.slope_at + row * g.slope_at_stride + column, g.slope_at_stride * sizeof(Y), count, bytes);
    fetch_rows(g.activated + row * g.n + column, g.n * sizeof(Y), count, bytes);
  }
}

// The panels of a weight: those it came with, or its own.
template <class T, class V = T>
class Weight {
 public:
  using C = compute_t<T>;
  using A = unit_t<C>;
  template <class Y>
  explicit Weight(const GemmArgs<T, V, Y>& g)
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
