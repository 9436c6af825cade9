// What happens to the sums of a product before they are stored, and where its operands come from. Included inside the
// namespace of an instruction set, after product.h.

// The end of a product for some of its columns.
template <bool Full, class T, class V, class Y>
class Epilogue {
  using A = accumulator_t<T>;
  static constexpr int64_t kLanesA = kLanes<A>;

 public:
  FASTVIT_INLINE Epilogue(const GemmArgs<T, V, Y>& g, const Columns<Full, A>& columns) : g_(g), columns_(columns) {
    for (int j = 0; j < kPanelVectors; j++) {
      bias_[j] = g.bias ? columns.of(g.bias, j) : Vec<A>{};
      scale_[j] = g.layer_scale ? columns.of(g.layer_scale, j) : Vec<A>{};
    }
  }

  // sums + bias, kept as preact where that is asked for; zero beyond the last column.
  FASTVIT_INLINE void preactivation(int64_t row, const A* sums, Vec<A>* v) const {
    for (int j = 0; j < kPanelVectors; j++) {
      v[j] = Vec<A>{};
      if (columns_.left(j) <= 0) continue;
      v[j] = load(sums + j * kLanesA);
      if (g_.bias) v[j] += bias_[j];
    }
    if (g_.preact) columns_.put(g_.preact + row * g_.preact_stride, v);
  }

  // y of a row.
  FASTVIT_INLINE void finish(int64_t row, const A* sums) const {
    Vec<A> v[kPanelVectors];
    preactivation(row, sums, v);
    const bool repeats = g_.residual_period != INT64_MAX, gaps = g_.group != INT64_MAX;  // divisions are slow
    const Y* residual = g_.residual + (repeats ? row % g_.residual_period : row) * g_.residual_stride;
    Y* y = g_.y + (gaps ? row + (row / g_.group + 1) * g_.gap : row) * g_.y_stride;
    if (g_.slope_at) {
      Vec<A> activated[kPanelVectors];
      for (int j = 0; j < kPanelVectors; j++) {
        Vec<A> slope;
        const Vec<A> at = columns_.of(g_.slope_at + row * g_.slope_at_stride, j);
        activated[j] = activate_with_slope<A>(at, g_.activation, slope);
        v[j] *= slope;
      }
      columns_.put(g_.activated + row * g_.n, activated);
    } else {
      for (int j = 0; j < kPanelVectors; j++) v[j] = activate<A>(v[j], g_.activation);
    }
    for (int j = 0; j < kPanelVectors; j++) {
      if (g_.layer_scale && g_.residual)
        v[j] = fma(v[j], scale_[j], columns_.of(residual, j));
      else if (g_.layer_scale)
        v[j] *= scale_[j];
      else if (g_.residual)
        v[j] += columns_.of(residual, j);
    }
    columns_.put(y, v);
  }

 private:
  const GemmArgs<T, V, Y>& g_;
  const Columns<Full, A> columns_;
  Vec<A> bias_[kPanelVectors], scale_[kPanelVectors];
};

// f(epilogue) for the columns from `first` on.
template <class T, class V, class Y, class F>
FASTVIT_INLINE void with_epilogue(const GemmArgs<T, V, Y>& g, int64_t first, const F& f) {
  with_columns<accumulator_t<T>>(first, g.n, [&]<bool Full>(const Columns<Full, accumulator_t<T>>& columns) {
    f(Epilogue<Full, T, V, Y>(g, columns));
  });
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
