// Packing and the register tile of the matrix products. Included inside the namespace of an instruction set, after
// simd.h.
//
// Both operands are packed with k outermost, so that one step of k reads two short contiguous runs whatever the strides
// of the matrices were: a tile [k][kTileRows], whose elements are broadcast, and a panel [k][kPanel], read as vectors.

// How T enters a product: as units that hold one k each, converted to the accumulator's type.
template <class T>
struct Units {
  using A = accumulator_t<T>;
  static constexpr int kPerUnit = 1;
  FASTVIT_INLINE static Vec<A> load_units(const T* p, int64_t elements) { return load(p, elements); }
  FASTVIT_INLINE static Vec<A> multiply_add(A a, Vec<A> b, Vec<A> sum) { return a * b + sum; }
};

#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
// Units of two consecutive k: 32 bits that only travel as a float until the instruction takes them apart.
template <>
struct Units<bfloat16> {
  static constexpr int kPerUnit = 2;
  FASTVIT_INLINE static Vec<float> load_units(const bfloat16* p, int64_t elements) {
    if (elements >= 32) return load_bits<Vec<float>>(p);
    bfloat16 buffer[32] = {};
    std::memcpy(buffer, p, elements * sizeof(bfloat16));
    return load_bits<Vec<float>>(buffer);
  }
  FASTVIT_INLINE static Vec<float> multiply_add(float a, Vec<float> b, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
};
#endif

template <class A>
constexpr int at_most_lanes(int rows) {
  return rows < kLanes<A> ? rows : kLanes<A>;
}

// As many accumulators as the registers hold beside the operands.
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
constexpr int kRegisterRows = 14;
#elif FASTVIT_ISA == FASTVIT_ISA_AVX2
constexpr int kRegisterRows = 6;
#else
constexpr int kRegisterRows = 4;
#endif
constexpr int kPanelVectors = 2;

template <class A>
constexpr int kTileRows = at_most_lanes<A>(kRegisterRows);
template <class A>
constexpr int kPanel = kPanelVectors * kLanes<A>;

inline int64_t units_of(int64_t k, int per_unit) { return (k + per_unit - 1) / per_unit; }

// Packing stores whole vectors: up to kLanes units beyond the last one are overwritten.
template <class A>
int64_t tile_stride(int64_t units) {
  return (units * kTileRows<A> + 2 * kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <int S, class V, size_t... J>
FASTVIT_INLINE void exchange(V& a, V& b, std::index_sequence<J...>) {
  constexpr int n = sizeof...(J);
#if defined(__clang__) || __GNUC__ >= 12
  V low = __builtin_shufflevector(a, b, ((J & S) ? n + J - S : J)...);
  V high = __builtin_shufflevector(a, b, ((J & S) ? n + J : J + S)...);
#else
  using Index = decltype(a == b);
  V low = __builtin_shuffle(a, b, Index{((J & S) ? n + J - S : J)...});
  V high = __builtin_shuffle(a, b, Index{((J & S) ? n + J : J + S)...});
#endif
  a = low;
  b = high;
}

template <class A, int S = kLanes<A> / 2>
FASTVIT_INLINE void transpose(Vec<A>* r) {
  constexpr int lanes = kLanes<A>;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; i++)
    if (!(i & S)) exchange<S>(r[i], r[i + S], std::make_index_sequence<lanes>{});
  if constexpr (S > 1) transpose<A, S / 2>(r);
}

// Writes up to kLanes rows of k elements as columns, dst[unit * width + row]; columns without a row are zero.
template <class T>
void pack(const T* src, int64_t stride, int64_t rows, int64_t k, accumulator_t<T>* dst, int64_t width) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, per_unit = Units<T>::kPerUnit;
  const int64_t units = units_of(k, per_unit);
  for (int64_t u = 0; u < units; u += lanes) {
    Vec<A> r[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++)
      r[i] = i < rows ? Units<T>::load_units(src + i * stride + u * per_unit, k - u * per_unit) : Vec<A>{};
    transpose<A>(r);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++)
      if (i < units - u) store(dst + (u + i) * width, r[i]);
  }
}

// One chain of roundings is at most this long: partial sums are added up, which keeps the error near that of a tree.
constexpr int64_t kChain = 256;

// out[R][NV * kLanes] = tile[units][R of AStride] x panel[units][b_stride].
template <class T, int R, int NV, int AStride>
void micro(const accumulator_t<T>* a, const accumulator_t<T>* b, int64_t b_stride, int64_t units,
           accumulator_t<T>* out) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>;
  int64_t begin = 0;
  do {
    const int64_t end = units - begin > kChain ? begin + kChain : units;
    Vec<A> sum[R][NV];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sum[i][j] = Vec<A>{};
    for (int64_t u = begin; u < end; u++) {
      Vec<A> column[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) column[j] = load(b + u * b_stride + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = Units<T>::multiply_add(a[u * AStride + i], column[j], sum[i][j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) {
        A* p = out + (i * NV + j) * lanes;
        store(p, begin == 0 ? sum[i][j] : load(p) + sum[i][j]);
      }
    begin = end;
  } while (begin < units);
}

template <class A>
using Micro = void (*)(const A* a, const A* b, int64_t b_stride, int64_t units, A* out);

template <class T, int NV, int AStride, size_t... R>
Micro<accumulator_t<T>> micro_of(int64_t rows, std::index_sequence<R...>) {
  static constexpr Micro<accumulator_t<T>> table[] = {&micro<T, static_cast<int>(R) + 1, NV, AStride>...};
  return table[rows - 1];
}

// The register tile for a number of rows in [1, kTileRows].
template <class T, int NV, int AStride>
Micro<accumulator_t<T>> micro_of(int64_t rows) {
  return micro_of<T, NV, AStride>(rows, std::make_index_sequence<kTileRows<accumulator_t<T>>>{});
}
