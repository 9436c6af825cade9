#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"
#include "cpu/attention_head.h"

// What one thread needs for one head: operands of the five products, and P and dS of all queries.
template <class T>
struct BackwardBuffers {
  using C = compute_t<T>;
  using A = unit_t<C>;
  int64_t units, padded, key_stride, queries, keys;
  A *k_rows, *v_rows, *k_columns, *q_columns, *dout_columns, *lines, *lines2, *scores, *dscores, *sums;
  C *p, *ds;

  BackwardBuffers(int64_t query_count, int64_t key_count, int64_t head_dim) : queries(query_count), keys(key_count) {
    units = units_of<C>(head_dim);
    padded = panels_of<C>(head_dim) * kPanel<C>;
    key_stride = panels_of<C>(key_count) * kPanel<C>;
    if (key_stride < lines_of<C>(key_count) * kLine<C>) key_stride = lines_of<C>(key_count) * kLine<C>;
  }
  // Lays the buffers out from `memory` on and answers their bytes.
  int64_t place(char* memory) {
    int64_t used = 0;
    const auto take = [&](auto*& p, int64_t count) {
      p = memory ? reinterpret_cast<std::remove_reference_t<decltype(p)>>(memory + used) : nullptr;
      used += (count * static_cast<int64_t>(sizeof(*p)) + 127) / 64 * 64;
    };
    const int64_t longest = queries > key_stride ? queries : key_stride;
    const int64_t line_units = row_units<C>(longest > padded ? longest : padded);
    take(k_rows, panels_of<C>(keys) * kPanel<C> * units);
    take(v_rows, panels_of<C>(keys) * kPanel<C> * units);
    take(k_columns, units_of<C>(keys) * padded);
    take(q_columns, units_of<C>(queries) * padded);
    take(dout_columns, units_of<C>(queries) * padded);
    take(lines, kTileRows * line_units);
    take(lines2, kTileRows * line_units);
    take(scores, kTileRows * key_stride);
    take(dscores, kTileRows * key_stride);
    take(sums, kTileRows * padded);
    take(p, queries * key_stride);
    take(ds, queries * key_stride);
    return used;
  }
};

// out[rows][E] = lines x panels that lie side by side as [k][padded].
template <class T>
void times_columns(const BackwardBuffers<T>& b, const unit_t<compute_t<T>>* lines, int64_t rows, int64_t k,
                   const unit_t<compute_t<T>>* columns, int64_t head_dim, T* out, int64_t stride) {
  using C = compute_t<T>;
  using A = unit_t<C>;
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<C>;
  for (int64_t e = 0; e < head_dim; e += panel) {
    const auto tile = head_dim - e > lanes ? micro_of<C, kPanelVectors>(rows) : micro_of<C, 1>(rows);
    tile(lines, columns + e * units_of<C>(k), panel, units_of<C>(k), b.sums + e, b.padded, false,
         reinterpret_cast<const char*>(columns));
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t e = 0; e < head_dim; e += lanes)
      store(out + i * stride + e, load(b.sums + i * b.padded + e), head_dim - e);
}

// A matrix (k, E) as panels of its columns.
template <class T>
void pack_head_columns(const T* src, int64_t stride, int64_t k, int64_t head_dim, unit_t<compute_t<T>>* dst) {
  using C = compute_t<T>;
  for (int64_t p = 0; p < panels_of<C>(head_dim); p++)
    pack_panel_by_columns<C>(src, stride, p * kPanel<C>, head_dim, k, dst + p * kPanel<C> * units_of<C>(k));
}

// P and dS of the queries [query, query + count), and their dQ.
template <class T>
void query_gradients(const AttentionBackwardArgs<T>& g, BackwardBuffers<T>& b, int64_t batch, int64_t head,
                     int64_t query, int64_t count) {
  using C = compute_t<T>;
  using A = unit_t<C>;
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<C>, per_unit = Units<C>::kPerUnit;
  const AttentionArgs<T>& f = g.forward;
  const int64_t visible = f.causal && query + count < f.keys ? query + count : f.keys;
  const int64_t row = f.heads * f.head_dim, at = ((batch * f.queries + query) * f.heads + head) * f.head_dim;
  const T* q = f.q + batch * f.q_strides[0] + head * f.q_strides[1] + query * f.q_strides[2];
  pack_lines<C>(q, f.q_strides[2], count, f.head_dim, b.lines);
  pack_lines<C>(g.dout + at, row, count, f.head_dim, b.lines2);
  for (int64_t key = 0; key < visible; key += panel) {
    const auto tile = visible - key > lanes ? micro_of<C, kPanelVectors>(count) : micro_of<C, 1>(count);
    const char* const next = reinterpret_cast<const char*>(b.k_rows);
    tile(b.lines, b.k_rows + key * b.units, panel, b.units, b.scores + key, b.key_stride, false, next);
    tile(b.lines2, b.v_rows + key * b.units, panel, b.units, b.dscores + key, b.key_stride, false, next);
  }
  const int64_t mask_offset = batch * f.mask_strides[0] + head * f.mask_strides[1];
  const int64_t mask_bytes = f.mask_kind == MaskKind::boolean ? 1 : f.mask_kind == MaskKind::additive ? sizeof(T) : 4;
  const char* mask = static_cast<const char*>(f.mask) + (f.mask ? mask_offset * mask_bytes : 0);
  const bool special = f.mask_kind != MaskKind::none || f.causal;
  for (int64_t i = 0; i < count; i++) {
    const A lse = g.lse[(batch * f.heads + head) * f.queries + query + i];
    const A shift = lse == -A(INFINITY) ? A(INFINITY) : lse;
    Vec<A> product{};
    for (int64_t e = 0; e < f.head_dim; e += lanes)
      product += load(g.dout + at + i * row + e, f.head_dim - e) * load(g.out + at + i * row + e, f.head_dim - e);
    const A delta = sum_of<A>(product);
    const A *scores = b.scores + i * b.key_stride, *dscores = b.dscores + i * b.key_stride;
    A* line = b.lines + i * lanes;
    C *p = b.p + (query + i) * b.key_stride, *ds = b.ds + (query + i) * b.key_stride;
    const auto put = [&](int64_t key, auto whole) __attribute__((always_inline)) {
      Vec<A> probability[per_unit] = {}, dscore[per_unit] = {};
      for (int j = 0; j < per_unit; j++) {
        const int64_t first = key + j * lanes, left = whole ? lanes : visible - first;
        if (left <= 0) break;
        const Vec<A> score = load(scores + first);
        probability[j] = special ? Rounded<C>::exp_of(masked(f, mask, query + i, first, left, score), A(1), shift)
                                 : Rounded<C>::exp_of(score, A(f.scale), shift);
        dscore[j] = probability[j] * (load(dscores + first) - delta) * A(f.scale);
        if (whole) continue;
        probability[j] = fill_beyond<A>(probability[j], left, 0);
        dscore[j] = fill_beyond<A>(dscore[j], left, 0);
      }
      const auto rounded = Units<C>::from(dscore);
      store(reinterpret_cast<A*>(p + key), Units<C>::from(probability));
      store(reinterpret_cast<A*>(ds + key), rounded);
      if (key < visible) store(line + key / kLine<C> * count * lanes, rounded);
    };
    int64_t key = 0;
    for (; key + kLine<C> <= visible; key += kLine<C>) put(key, std::true_type{});
    for (; key < b.key_stride; key += kLine<C>) put(key, std::false_type{});
  }
  T* dq = g.dq + batch * g.dq_strides[0] + head * g.dq_strides[1] + query * g.dq_strides[2];
  times_columns(b, b.lines, count, visible, b.k_columns, f.head_dim, dq, g.dq_strides[2]);
}

template <class T>
void head_gradients(const AttentionBackwardArgs<T>& g, BackwardBuffers<T>& b, int64_t batch, int64_t head) {
  using C = compute_t<T>;
  const AttentionArgs<T>& f = g.forward;
  const int64_t row = f.heads * f.head_dim, at = (batch * f.queries * f.heads + head) * f.head_dim;
  const T* q = f.q + batch * f.q_strides[0] + head * f.q_strides[1];
  const T* k = f.k + batch * f.k_strides[0] + head * f.k_strides[1];
  const T* v = f.v + batch * f.v_strides[0] + head * f.v_strides[1];
  for (int64_t p = 0; p < panels_of<C>(f.keys); p++) {
    const int64_t offset = p * kPanel<C> * b.units;
    pack_panel<C>(k, f.k_strides[2], p * kPanel<C>, f.keys, f.head_dim, b.k_rows + offset);
    pack_panel<C>(v, f.v_strides[2], p * kPanel<C>, f.keys, f.head_dim, b.v_rows + offset);
  }
  pack_head_columns(k, f.k_strides[2], f.keys, f.head_dim, b.k_columns);
  pack_head_columns(q, f.q_strides[2], f.queries, f.head_dim, b.q_columns);
  pack_head_columns(g.dout + at, row, f.queries, f.head_dim, b.dout_columns);
  const Tiles queries(f.queries), keys(f.keys);
  const TileUnit unit;
  for (int64_t t = 0; t < queries.count; t++) query_gradients(g, b, batch, head, queries.begin(t), queries.height(t));
  for (int64_t t = 0; t < keys.count; t++) {
    const int64_t key = keys.begin(t), count = keys.height(t);
    T* dk = g.dk + batch * g.dk_strides[0] + head * g.dk_strides[1] + key * g.dk_strides[2];
    T* dv = g.dv + batch * g.dv_strides[0] + head * g.dv_strides[1] + key * g.dv_strides[2];
    pack_columns_as_lines<C>(b.ds + key, b.key_stride, count, f.queries, b.lines, b.key_stride - key);
    pack_columns_as_lines<C>(b.p + key, b.key_stride, count, f.queries, b.lines2, b.key_stride - key);
    times_columns(b, b.lines, count, f.queries, b.q_columns, f.head_dim, dk, g.dk_strides[2]);
    times_columns(b, b.lines2, count, f.queries, b.dout_columns, f.head_dim, dv, g.dv_strides[2]);
  }
}

template <class T>
void attention_backward(const AttentionBackwardArgs<T>& g) {
  const AttentionArgs<T>& f = g.forward;
  if (f.head_dim == 0) return;
  BackwardBuffers<T> buffers(f.queries, f.keys, f.head_dim);
  const int64_t pairs = f.batch * f.heads, threads = thread_count(), bytes = buffers.place(nullptr);
  const Scratch scratch(threads * bytes);
  Team team(threads, 1);
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; lane++) {
      BackwardBuffers<T> mine = buffers;
      mine.place(scratch.as<char>() + lane * bytes);
      Team::Worker(team, lane).each(pairs, [&](int64_t pair) {
        head_gradients(g, mine, pair / f.heads, pair % f.heads);
      });
    }
  });
}
