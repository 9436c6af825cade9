// Attention of one head. Included inside the namespace of an instruction set, after micro.h and math.h.
//
// A tile of queries meets every key at once: scores [query][key] stay in the cache, softmax runs along a row, and the
// probabilities are left as the lines that the product with v reads.

template <class T>
bool visible(const AttentionArgs<T>& g, const void* mask, int64_t query, int64_t key) {
  if (g.causal && key > query) return false;
  if (g.mask_kind != MaskKind::boolean) return true;
  return static_cast<const uint8_t*>(mask)[query * g.mask_strides[2] + key * g.mask_strides[3]] != 0;
}

// Up to a vector of elements `step` apart.
template <class T>
FASTVIT_INLINE Vec<accumulator_t<T>> gather(const T* p, int64_t step, int64_t n) {
  constexpr int lanes = kLanes<accumulator_t<T>>;
  if (step == 1) return load(p, n);
  T values[lanes] = {};
  for (int64_t i = 0; i < lanes && i < n; i++) values[i] = p[i * step];
  return load(values);
}

// The scores of one query and the n keys from `key` on, scaled and masked.
template <class T>
FASTVIT_INLINE Vec<accumulator_t<T>> masked(const AttentionArgs<T>& g, const void* mask, int64_t query, int64_t key,
                                            int64_t n, Vec<accumulator_t<T>> score) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>;
  const int64_t step = g.mask_strides[3], offset = query * g.mask_strides[2] + key * step;
  const Vec<A> hidden = Vec<A>{} - A(INFINITY);
  score *= A(g.scale);
  if (g.mask_kind == MaskKind::boolean) {
    const uint8_t* m = static_cast<const uint8_t*>(mask) + offset;
    Vec<A> shown{};
    for (int64_t i = 0; i < lanes && i < n; i++) shown[i] = m[i * step] ? A(1) : A(0);
    score = shown != Vec<A>{} ? score : hidden;
  } else if (g.mask_kind == MaskKind::additive) {
    score += gather(static_cast<const T*>(mask) + offset, step, n);
  } else if (g.mask_kind == MaskKind::additive_float) {
    const float* m = static_cast<const float*>(mask) + offset;
    for (int64_t i = 0; i < lanes && i < n; i++) score[i] += m[i * step];
  }
  if (g.causal && key + lanes > query + 1)
    for (int64_t i = 0; i < lanes; i++)
      if (key + i > query) score[i] = -A(INFINITY);
  return score;
}

// exp(scale * scores + mask - max) of the queries [query, query + count) as lines, and each one's maximum and sum. What
// runs along a row ends in a vector; those of all rows are then reduced at once, so that no row waits for another.
template <class T, class C>
void softmax_tile(const AttentionArgs<T>& g, const void* mask, int64_t query, int64_t count, int64_t keys,
                  accumulator_t<T>* scores, int64_t stride, unit_t<C>* probabilities, accumulator_t<T>* maximum,
                  accumulator_t<T>* total) {
  using A = accumulator_t<T>;
  constexpr int64_t lanes = kLanes<A>, per_unit = Units<C>::kPerUnit;
  const bool special = g.mask_kind != MaskKind::none || g.causal || !(g.scale > 0);
  const int64_t whole = keys / lanes * lanes, end = lines_of<C>(keys) * kLine<C>;
  const Vec<A> hidden = Vec<A>{} - A(INFINITY);
  const A factor = special ? A(1) : A(g.scale);
  for (int64_t first = 0; first < count; first += lanes) {
    const int64_t rows = count - first < lanes ? count - first : lanes;
    A* row = scores + first * stride;
    Vec<A> result[lanes] = {};
    for (int64_t i = 0; i < rows; i++, row += stride) {
      if (special)
        for (int64_t key = 0; key < keys; key += lanes)
          store(row + key, masked(g, mask, query + first + i, key, keys - key, load(row + key)));
      Vec<A> largest = hidden;
      if (whole < keys) store(row + whole, largest = fill_beyond<A>(load(row + whole), keys - whole, -A(INFINITY)));
      for (int64_t key = whole + (whole < keys) * lanes; key < end; key += lanes) store(row + key, hidden);
      for (int64_t key = 0; key < whole; key += lanes) largest = larger<A>(load(row + key), largest);
      result[i] = largest;
    }
    A shift[lanes];
    const Vec<A> top = across<A>(result, larger<A>) * factor;
    store(maximum + first, top, rows);
    store(shift, top == hidden ? Vec<A>{} : top);
    row = scores + first * stride;
    for (int64_t i = 0; i < rows; i++, row += stride) {
      unit_t<C>* out = probabilities + (first + i) * lanes;
      Vec<A> sum[per_unit] = {};
      for (int64_t key = 0; key < end; key += kLine<C>, out += count * lanes) {
        Vec<A> e[per_unit];
        for (int v = 0; v < per_unit; v++) {
          e[v] = Rounded<C>::exp_of(load(row + key + v * lanes), factor, shift[i]);
          sum[v] += e[v];
        }
        store(out, Units<C>::from(e));
      }
      for (int v = 1; v < per_unit; v++) sum[0] += sum[v];
      result[i] = sum[0];
    }
    store(total + first, across<A>(result, [](Vec<A> a, Vec<A> b) { return a + b; }), rows);
  }
}

// Values as [unit of keys][padded E]; answers whether all of them are finite.
template <class C, class T>
bool pack_values(const T* v, int64_t stride, int64_t keys, int64_t width, unit_t<C>* dst, int64_t padded) {
  using A = unit_t<C>;
  constexpr int lanes = kLanes<A>, per_unit = Units<C>::kPerUnit;
  Vec<A> check{};
  for (int64_t key = 0; key < keys; key += per_unit)
    for (int64_t e = 0; e < padded; e += lanes, dst += lanes) {
      const T* p = v + key * stride + e;
      const int64_t n = width - e;
      for (int j = 0; j < per_unit && key + j < keys && n > 0; j++) check += load(p + j * stride, n) * A(0);
      store(dst, n > 0 ? Units<C>::beside(p, stride, n, keys - key) : Vec<A>{});
    }
  return sum_of<A>(check) == A(0);
}

// What one thread needs for one head.
template <class T>
struct HeadBuffers {
  using C = compute_t<T>;
  using A = unit_t<C>;
  int64_t units, padded, score_stride, key_size, value_size;
  A *keys, *values, *queries, *scores, *probabilities, *sums;
  bool finite_values = true;

  HeadBuffers(int64_t key_count, int64_t head_dim) {
    constexpr int64_t lanes = kLanes<A>;
    units = units_of<C>(head_dim);
    padded = (head_dim + lanes - 1) / lanes * lanes;
    score_stride = panels_of<C>(key_count) * kPanel<C>;
    if (score_stride < lines_of<C>(key_count) * kLine<C>) score_stride = lines_of<C>(key_count) * kLine<C>;
    key_size = panels_of<C>(key_count) * kPanel<C> * units;
    value_size = units_of<C>(key_count) * padded + kPanel<C>;
  }
  // In elements of A.
  int64_t size() const {
    return key_size + value_size + kTileRows * (row_units<C>(units * Units<C>::kPerUnit) + 2 * score_stride + padded) +
           4 * kPanel<C>;
  }
  void place(A* memory) {
    keys = memory;
    values = keys + key_size;
    queries = values + (value_size + 15) / 16 * 16;
    scores = queries + kTileRows * row_units<C>(units * Units<C>::kPerUnit);
    probabilities = scores + kTileRows * score_stride;
    sums = probabilities + kTileRows * score_stride;
  }
};

template <class T>
void pack_head(const AttentionArgs<T>& g, HeadBuffers<T>& buffers, int64_t batch, int64_t head) {
  using C = compute_t<T>;
  const T* k = g.k + batch * g.k_strides[0] + head * g.k_strides[1];
  const T* v = g.v + batch * g.v_strides[0] + head * g.v_strides[1];
  for (int64_t p = 0; p < panels_of<C>(g.keys); p++)
    pack_panel<C>(k, g.k_strides[2], p * kPanel<C>, g.keys, g.head_dim, buffers.keys + p * buffers.units * kPanel<C>);
  buffers.finite_values = pack_values<C>(v, g.v_strides[2], g.keys, g.head_dim, buffers.values, buffers.padded);
}

// Values that are not finite must not reach the queries that cannot see them, and 0 * inf would: these heads are summed
// key by key.
template <class T, class Put>
void visible_sum(const AttentionArgs<T>& g, const HeadBuffers<T>& buffers, int64_t batch, int64_t head,
                 const void* mask, int64_t query, int64_t keys, const accumulator_t<T>* scores, accumulator_t<T> shift,
                 accumulator_t<T> inverse, const Put& put) {
  using A = accumulator_t<T>;
  const T* v = g.v + batch * g.v_strides[0] + head * g.v_strides[1];
  for (int64_t e = 0; e < g.head_dim; e += kLanes<A>) {
    Vec<A> sum{};
    for (int64_t key = 0; key < keys; key++)
      if (visible(g, mask, query, key))
        sum += load(v + key * g.v_strides[2] + e, g.head_dim - e) * A(::exp(double(scores[key] - shift)));
    put(query, e, sum * inverse);
  }
}

// The queries [query, query + count) of the head in the buffers, count <= kTileRows; put(query, e, values) takes the
// result a vector at a time.
template <class T, class Put>
FASTVIT_INLINE void attend(const AttentionArgs<T>& g, const HeadBuffers<T>& buffers, int64_t batch, int64_t head,
                           int64_t query, int64_t count, const Put& put) {
  using C = compute_t<T>;
  using A = unit_t<C>;
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<C>;
  const int64_t keys = g.causal && query + count < g.keys ? query + count : g.keys, stride = buffers.score_stride;
  const T* q = g.q + batch * g.q_strides[0] + head * g.q_strides[1] + query * g.q_strides[2];
  pack_lines<C>(q, g.q_strides[2], count, g.head_dim, buffers.queries);
  const TileUnit unit;
  for (int64_t key = 0; key < keys; key += panel) {
    const auto tile = keys - key > lanes ? micro_of<C, kPanelVectors>(count) : micro_of<C, 1>(count);
    const A* k = buffers.keys + key * buffers.units;
    tile(buffers.queries, k, panel, buffers.units, buffers.scores + key, stride, false,
         reinterpret_cast<const char*>(k + panel * buffers.units));
  }
  const int64_t mask_offset = batch * g.mask_strides[0] + head * g.mask_strides[1];
  const int64_t mask_bytes = g.mask_kind == MaskKind::boolean ? 1 : g.mask_kind == MaskKind::additive ? sizeof(T) : 4;
  const char* mask = static_cast<const char*>(g.mask) + (g.mask ? mask_offset * mask_bytes : 0);
  A maximum[kTileRows], total[kTileRows], inverse[kTileRows];
  softmax_tile<T, C>(g, mask, query, count, keys, buffers.scores, stride, buffers.probabilities, maximum, total);
  for (int64_t i = 0; i < count; i++) {
    inverse[i] = maximum[i] == -A(INFINITY) && total[i] == A(0) ? A(0) : A(1) / total[i];
    if (g.lse) g.lse[(batch * g.heads + head) * g.queries + query + i] = maximum[i] + std::log(total[i]);
  }
  if (!buffers.finite_values && (g.causal || g.mask_kind == MaskKind::boolean)) {
    for (int64_t i = 0; i < count; i++)
      visible_sum(g, buffers, batch, head, mask, query + i, keys, buffers.scores + i * stride,
                  maximum[i] == -A(INFINITY) ? A(0) : maximum[i], inverse[i], put);
    return;
  }
  for (int64_t e = 0; e < g.head_dim; e += panel) {
    const auto tile = buffers.padded - e > lanes ? micro_of<C, kPanelVectors>(count) : micro_of<C, 1>(count);
    tile(buffers.probabilities, buffers.values + e, buffers.padded, units_of<C>(keys), buffers.sums + e, buffers.padded,
         false, reinterpret_cast<const char*>(buffers.values));
  }
  for (int64_t i = 0; i < count; i++)
    for (int64_t e = 0; e < g.head_dim; e += lanes)
      put(query + i, e, load(buffers.sums + i * buffers.padded + e) * inverse[i]);
}
