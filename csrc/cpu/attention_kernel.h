#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"

// Scores are kept transposed, [S][query], so that softmax runs along the keys with a query in every lane, and so that
// the probabilities of a block are already a tile to broadcast from in the product with v.

template <class T>
bool visible(const AttentionArgs<T>& g, const void* mask, int64_t query, int64_t key) {
  if (g.causal && key > query) return false;
  if (g.mask_kind != MaskKind::boolean) return true;
  return static_cast<const uint8_t*>(mask)[query * g.mask_strides[2] + key * g.mask_strides[3]] != 0;
}

template <class T>
FASTVIT_INLINE Vec<accumulator_t<T>> masked(const AttentionArgs<T>& g, const void* mask, int64_t query, int64_t count,
                                            int64_t key, Vec<accumulator_t<T>> score) {
  using A = accumulator_t<T>;
  const int64_t n = count < kLanes<A> ? count : kLanes<A>;
  const int64_t step = g.mask_strides[2], offset = query * step + key * g.mask_strides[3];
  Vec<A> lanes{};
  if (g.mask_kind == MaskKind::boolean) {
    const uint8_t* m = static_cast<const uint8_t*>(mask) + offset;
    if (step == 0) return *m ? score : Vec<A>{} - A(INFINITY);
    for (int64_t i = 0; i < n; i++) lanes[i] = m[i * step] ? A(1) : A(0);
    return lanes != Vec<A>{} ? score : Vec<A>{} - A(INFINITY);
  }
  if (g.mask_kind == MaskKind::additive) {
    const T* m = static_cast<const T*>(mask) + offset;
    T values[kLanes<A>] = {};
    for (int64_t i = 0; i < n; i++) values[i] = m[i * step];
    return score + load(values);
  }
  const float* m = static_cast<const float*>(mask) + offset;
  for (int64_t i = 0; i < n; i++) lanes[i] = m[i * step];
  return score + lanes;
}

template <class A>
FASTVIT_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// scores <- exp(scale * scores + mask - max), and the maximum and the sum of every query.
template <class T, int NV>
void softmax(const AttentionArgs<T>& g, const void* mask, int64_t query, int64_t count, int64_t keys,
             accumulator_t<T>* scores, accumulator_t<T>* maximum, accumulator_t<T>* total) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, width = NV * lanes;
  Vec<A> positions;
  for (int i = 0; i < lanes; i++) positions[i] = A(i);
  Vec<A> largest[NV];
  for (int v = 0; v < NV; v++) largest[v] = Vec<A>{} - A(INFINITY);
  for (int64_t key = 0; key < keys; key++)
    for (int v = 0; v < NV; v++) {
      A* p = scores + key * width + v * lanes;
      const int64_t first = query + v * lanes;
      Vec<A> s = load(p) * A(g.scale);
      if (g.mask_kind != MaskKind::none && count > v * lanes) s = masked(g, mask, first, count - v * lanes, key, s);
      if (g.causal && key > first) s = positions < A(key - first) ? Vec<A>{} - A(INFINITY) : s;
      largest[v] = larger<A>(s, largest[v]);
      store(p, s);
    }
  Vec<A> sum[NV] = {}, shift[NV];
  for (int v = 0; v < NV; v++) shift[v] = largest[v] == Vec<A>{} - A(INFINITY) ? Vec<A>{} : largest[v];
  constexpr int64_t kPartial = 32;
  for (int64_t begin = 0; begin < keys; begin += kPartial) {
    const int64_t end = begin + kPartial < keys ? begin + kPartial : keys;
    Vec<A> part[NV] = {};
    for (int64_t key = begin; key < end; key++)
      for (int v = 0; v < NV; v++) {
        A* p = scores + key * width + v * lanes;
        const Vec<A> e = exp(load(p) - shift[v]);
        part[v] += e;
        store(p, e);
      }
    for (int v = 0; v < NV; v++) sum[v] += part[v];
  }
  for (int v = 0; v < NV; v++) {
    store(maximum + v * lanes, largest[v]);
    store(total + v * lanes, sum[v]);
  }
}

#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
FASTVIT_INLINE Vec<float> pair(VecU low, VecU high) { return bit_cast<Vec<float>>(low | (high << 16)); }
FASTVIT_INLINE VecU bits_of(const bfloat16* p, int64_t n) { return bit_cast<VecU>(load(p, n)) >> 16; }
#endif

// Values as [unit of keys][padded E]; answers whether all of them are finite.
template <class T>
bool pack_values(const T* v, int64_t stride, int64_t keys, int64_t width, accumulator_t<T>* dst, int64_t padded) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, per_unit = Units<T>::kPerUnit;
  Vec<A> check{};
  for (int64_t key = 0; key < keys; key += per_unit)
    for (int64_t e = 0; e < width; e += lanes) {
      const T* p = v + key * stride + e;
      const Vec<A> value = load(p, width - e);
      check += value * A(0);
      A* out = dst + key / per_unit * padded + e;
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
      if constexpr (per_unit == 2) {
        const bool both = key + 1 < keys;
        if (both) check += load(p + stride, width - e) * A(0);
        store(out, pair(bits_of(p, width - e), both ? bits_of(p + stride, width - e) : VecU{}));
        continue;
      }
#endif
      store(out, value);
    }
  return sum_of<A>(check) == A(0);
}

// Probabilities as the units of the second product, in place.
template <class T, int NV>
FASTVIT_INLINE void pack_probabilities(accumulator_t<T>* scores, int64_t keys) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
  if constexpr (Units<T>::kPerUnit == 2) {
    constexpr int lanes = kLanes<float>, width = NV * lanes;
    for (int64_t key = 0; key < keys; key += 2)
      for (int v = 0; v < NV; v++) {
        const float* p = scores + key * width + v * lanes;
        const Vec<float> next = key + 1 < keys ? load(p + width) : Vec<float>{};
        bfloat16 low[lanes], high[lanes];
        store(low, load(p));
        store(high, next);
        store(scores + key / 2 * width + v * lanes, pair(bits_of(low, lanes), bits_of(high, lanes)));
      }
  }
#endif
}

// What one thread needs for one head.
template <class T>
struct HeadBuffers {
  using A = accumulator_t<T>;
  A *keys, *values, *queries, *scores;
  bool finite_values;
};

// Values that are not finite must not reach the queries that cannot see them, and 0 * inf would: these heads are summed
// key by key.
template <class T>
void visible_sum(const AttentionArgs<T>& g, const T* v, const void* mask, int64_t query, int64_t keys,
                 const accumulator_t<T>* probability, int64_t width, accumulator_t<T> inverse, T* out) {
  using A = accumulator_t<T>;
  for (int64_t e = 0; e < g.head_dim; e += kLanes<A>) {
    Vec<A> sum{};
    for (int64_t key = 0; key < keys; key++)
      if (visible(g, mask, query, key))
        sum += load(v + key * g.v_strides[2] + e, g.head_dim - e) * probability[key * width];
    store(out + e, sum * inverse, g.head_dim - e);
  }
}

template <class T, int NV>
void product_with_values(const AttentionArgs<T>& g, const HeadBuffers<T>& buffers, int64_t count, int64_t keys,
                         int64_t padded, const accumulator_t<T>* inverse, T* out) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, width = NV * lanes;
  const int64_t units = units_of(keys, Units<T>::kPerUnit), row_stride = g.heads * g.head_dim;
  alignas(64) A sums[kTileRows<A> * kPanel<A>];
  const int64_t tiles = (count + kTileRows<A> - 1) / kTileRows<A>;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t first = count * t / tiles, rows = count * (t + 1) / tiles - first;
    for (int64_t e = 0; e < g.head_dim; e += kPanel<A>) {
      const int vectors = padded - e >= kPanel<A> ? kPanelVectors : 1;
      const auto micro =
          vectors == kPanelVectors ? micro_of<T, kPanelVectors, width>(rows) : micro_of<T, 1, width>(rows);
      micro(buffers.scores + first, buffers.values + e, padded, units, sums);
      for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < vectors && e + j * lanes < g.head_dim; j++)
          store(out + (first + i) * row_stride + e + j * lanes,
                load(sums + (i * vectors + j) * lanes) * inverse[first + i], g.head_dim - e - j * lanes);
    }
  }
}

// The queries [query, query + count) of one head, count <= NV * kLanes.
template <class T, int NV>
void attend(const AttentionArgs<T>& g, const HeadBuffers<T>& buffers, int64_t batch, int64_t head, int64_t query,
            int64_t count) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, width = NV * lanes, tile_rows = kTileRows<A>;
  const int64_t units = units_of(g.head_dim, Units<T>::kPerUnit), padded = (g.head_dim + lanes - 1) / lanes * lanes;
  const int64_t keys = g.causal && query + count < g.keys ? query + count : g.keys;
  const T* q = g.q + batch * g.q_strides[0] + head * g.q_strides[1] + query * g.q_strides[2];
  for (int v = 0; v < NV; v++)
    pack(q + v * lanes * g.q_strides[2], g.q_strides[2], count - v * lanes, g.head_dim, buffers.queries + v * lanes,
         width);
  for (int64_t key = 0, t = 0; key < keys; key += tile_rows, t++) {
    const int64_t rows = keys - key < tile_rows ? keys - key : tile_rows;
    micro_of<T, NV, tile_rows>(rows)(buffers.keys + t * tile_stride<A>(units), buffers.queries, width, units,
                                     buffers.scores + key * width);
  }
  const int64_t mask_offset = batch * g.mask_strides[0] + head * g.mask_strides[1];
  const int64_t mask_bytes = g.mask_kind == MaskKind::boolean ? 1 : g.mask_kind == MaskKind::additive ? sizeof(T) : 4;
  const char* mask = static_cast<const char*>(g.mask) + (g.mask ? mask_offset * mask_bytes : 0);
  alignas(64) A maximum[width], total[width], inverse[width];
  softmax<T, NV>(g, mask, query, count, keys, buffers.scores, maximum, total);
  for (int64_t i = 0; i < count; i++) {
    inverse[i] = maximum[i] == -A(INFINITY) && total[i] == A(0) ? A(0) : A(1) / total[i];
    g.lse[(batch * g.heads + head) * g.queries + query + i] = maximum[i] + std::log(total[i]);
  }
  T* out = g.out + ((batch * g.queries + query) * g.heads + head) * g.head_dim;
  if (!buffers.finite_values && (g.causal || g.mask_kind == MaskKind::boolean)) {
    const T* v = g.v + batch * g.v_strides[0] + head * g.v_strides[1];
    for (int64_t i = 0; i < count; i++)
      visible_sum(g, v, mask, query + i, keys, buffers.scores + i, width, inverse[i], out + i * g.heads * g.head_dim);
    return;
  }
  pack_probabilities<T, NV>(buffers.scores, keys);
  product_with_values<T, NV>(g, buffers, count, keys, padded, inverse, out);
}

template <class T>
void attention(const AttentionArgs<T>& g) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, block = kPanel<A>, tile_rows = kTileRows<A>, per_unit = Units<T>::kPerUnit;
  if (g.queries == 0 || g.head_dim == 0) return;
  const int64_t units = units_of(g.head_dim, per_unit), padded = (g.head_dim + lanes - 1) / lanes * lanes;
  const int64_t stride = tile_stride<A>(units), tiles = (g.keys + tile_rows - 1) / tile_rows;
  const int64_t key_size = tiles * stride, value_size = units_of(g.keys, per_unit) * padded;
  const int64_t query_size = (units + lanes) * block, score_size = (g.keys + 1) * block;
  const int64_t pairs = g.batch * g.heads, blocks = (g.queries + block - 1) / block, threads = thread_count();
  int64_t splits = pairs % threads == 0 || pairs >= 4 * threads ? 1 : (4 * threads + pairs - 1) / (pairs + 1);
  splits = splits < blocks ? splits : blocks;
  parallel_for(pairs * splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch((key_size + value_size + query_size + score_size + 4 * lanes) * sizeof(A));
    HeadBuffers<T> buffers;
    buffers.queries = scratch.as<A>();
    buffers.scores = buffers.queries + query_size;
    buffers.values = buffers.scores + score_size;
    buffers.keys = buffers.values + value_size;
    int64_t packed = -1;
    for (int64_t item = begin; item < end; item++) {
      const int64_t pair = item / splits, split = item % splits, batch = pair / g.heads, head = pair % g.heads;
      if (pair != packed) {
        const T* k = g.k + batch * g.k_strides[0] + head * g.k_strides[1];
        const T* v = g.v + batch * g.v_strides[0] + head * g.v_strides[1];
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t key = t * tile_rows, rows = g.keys - key < tile_rows ? g.keys - key : tile_rows;
          pack(k + key * g.k_strides[2], g.k_strides[2], rows, g.head_dim, buffers.keys + t * stride, tile_rows);
        }
        buffers.finite_values = pack_values(v, g.v_strides[2], g.keys, g.head_dim, buffers.values, padded);
        packed = pair;
      }
      const int64_t last = blocks * (split + 1) / splits * block;
      for (int64_t query = blocks * split / splits * block; query < last && query < g.queries; query += block) {
        const int64_t left = g.queries - query;
        if (left > lanes)
          attend<T, kPanelVectors>(g, buffers, batch, head, query, left < block ? left : block);
        else
          attend<T, 1>(g, buffers, batch, head, query, left);
      }
    }
  });
}
