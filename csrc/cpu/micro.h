// The register tile of the matrix products and the layouts of its operands. Included inside the namespace of an
// instruction set, after simd.h.
//
// A unit is what one lane of an accumulator consumes per step: one element, or as many neighbours along k as the dot
// product instructions take. Rows lie as lines: tile by tile, [line][row][kLanes units], so that a row keeps its order
// and a tile is one stream. Weights lie as panels: [unit][kPanel], a vector of output channels for each unit of k.

// The type a product of T computes with.
template <class T>
struct ComputeOf {
  using type = accumulator_t<T>;
};
template <>
struct ComputeOf<int8_t> {
  using type = int8_t;
};
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
template <>
struct ComputeOf<bfloat16> {
  using type = bfloat16;
};
#endif
template <class T>
using compute_t = typename ComputeOf<T>::type;

// Units only travel as A until the instruction takes them apart.
template <class C>
struct Units {
  using A = C;
  static constexpr int kPerUnit = 1;
  // The first n of a vector's units from elements of T; the others are zero.
  template <class T>
  FASTVIT_INLINE static Vec<A> from(const T* p, int64_t n) {
    return load(p, n);
  }
  // kPerUnit vectors of numbers as a vector of units.
  FASTVIT_INLINE static Vec<A> from(const Vec<A>* v) { return v[0]; }
  // The first n units whose elements are below one another in the rows from p on, of which there are `rows`.
  template <class T>
  FASTVIT_INLINE static Vec<A> beside(const T* p, int64_t, int64_t n, int64_t rows) {
    return rows > 0 ? load(p, n) : Vec<A>{};
  }
  FASTVIT_INLINE static Vec<A> multiply_add(A a, Vec<A> b, Vec<A> sum) { return a * b + sum; }
};

#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
template <>
struct Units<bfloat16> {
  using A = float;
  static constexpr int kPerUnit = 2;
  template <class T>
  FASTVIT_INLINE static Vec<float> from(const T* p, int64_t n) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (n >= 32) return load_bits<Vec<float>>(p);
      bfloat16 buffer[32] = {};
      std::memcpy(buffer, p, n * sizeof(bfloat16));
      return load_bits<Vec<float>>(buffer);
    } else {
      const Vec<float> v[2] = {load(p, n), n > 16 ? load(p + 16, n - 16) : Vec<float>{}};
      return from(v);
    }
  }
  FASTVIT_INLINE static Vec<float> from(const Vec<float>* v) { return (Vec<float>)_mm512_cvtne2ps_pbh(v[1], v[0]); }
  template <class T>
  FASTVIT_INLINE static Vec<float> beside(const T* p, int64_t stride, int64_t n, int64_t rows) {
    const VecU low = rows > 0 ? bits(p, n) : VecU{}, high = rows > 1 ? bits(p + stride, n) : VecU{};
    return bit_cast<Vec<float>>(low | (high << 16));
  }
  FASTVIT_INLINE static VecU bits(const float* p, int64_t n) {
    return __builtin_convertvector((VecU16)_mm512_cvtneps_pbh(load(p, n)), VecU);
  }
  FASTVIT_INLINE static VecU bits(const bfloat16* p, int64_t n) {
    if (n >= 16) return __builtin_convertvector(load_bits<VecU16>(p), VecU);
    return bit_cast<VecU>(load(p, n)) >> 16;
  }
  FASTVIT_INLINE static Vec<float> multiply_add(float a, Vec<float> b, Vec<float> sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
};
#endif

// Four unsigned bytes of a row times four signed ones of a weight; sums are exact.
template <>
struct Units<int8_t> {
  using A = int32_t;
  static constexpr int kPerUnit = 4;
  // Signed bytes as they are.
  FASTVIT_INLINE static VecI from(const int8_t* p, int64_t n) {
    if (n >= static_cast<int64_t>(sizeof(VecI))) return load_bits<VecI>(p);
    int8_t buffer[sizeof(VecI)] = {};
    std::memcpy(buffer, p, n);
    return load_bits<VecI>(buffer);
  }
  FASTVIT_INLINE static VecI multiply_add(int32_t a, VecI b, VecI sum) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
    // The intrinsic makes GCC 12 spill accumulators.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(a)), "v"(b));
    return sum;
#elif FASTVIT_ISA >= FASTVIT_ISA_AVX2
    // Bytes as 16-bit numbers, even and odd ones apart, since the instruction for bytes saturates.
    const int32_t even = a & 0x00ff00ff, odd = (a >> 8) & 0x00ff00ff;
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
    const __m512i low = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)b, 8), 8), high = _mm512_srai_epi16((__m512i)b, 8);
    return sum + (VecI)_mm512_madd_epi16(low, _mm512_set1_epi32(even)) +
           (VecI)_mm512_madd_epi16(high, _mm512_set1_epi32(odd));
#else
    const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8), high = _mm256_srai_epi16((__m256i)b, 8);
    return sum + (VecI)_mm256_madd_epi16(low, _mm256_set1_epi32(even)) +
           (VecI)_mm256_madd_epi16(high, _mm256_set1_epi32(odd));
#endif
#else
    for (int j = 0; j < 4; j++) sum += (b << (24 - 8 * j) >> 24) * ((a >> (8 * j)) & 255);
    return sum;
#endif
  }
};

template <class C>
using unit_t = typename Units<C>::A;

// As many accumulators as the registers hold beside the operands.
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
constexpr int kTileRows = 14;
#elif FASTVIT_ISA == FASTVIT_ISA_AVX2
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanelVectors = 2;

template <class C>
constexpr int kPanel = kPanelVectors * kLanes<unit_t<C>>;
template <class C>
constexpr int kLine = kLanes<unit_t<C>> * Units<C>::kPerUnit;

template <class C>
int64_t units_of(int64_t k) {
  return (k + Units<C>::kPerUnit - 1) / Units<C>::kPerUnit;
}
template <class C>
int64_t lines_of(int64_t k) {
  return (k + kLine<C> - 1) / kLine<C>;
}
// Units that a row of k elements takes as lines.
template <class C>
int64_t row_units(int64_t k) {
  return lines_of<C>(k) * kLanes<unit_t<C>>;
}
template <class C>
int64_t panels_of(int64_t n) {
  return (n + kPanel<C> - 1) / kPanel<C>;
}

// Rows cut into tiles of nearly equal height.
struct Tiles {
  int64_t rows, count;
  explicit Tiles(int64_t m) : rows(m), count((m + kTileRows - 1) / kTileRows) {}
  int64_t begin(int64_t tile) const { return rows * tile / count; }
  int64_t height(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

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

// f of each vector's lanes: lane i is that of r[i]. What is in r is lost.
template <class A, int S = kLanes<A> / 2, class F>
FASTVIT_INLINE Vec<A> across(Vec<A>* r, const F& f) {
#pragma GCC unroll 16
  for (int i = 0; i < S; i++) {
    exchange<S>(r[i], r[i + S], std::make_index_sequence<kLanes<A>>{});
    r[i] = f(r[i], r[i + S]);
  }
  if constexpr (S > 1) return across<A, S / 2>(r, f);
  return r[0];
}

// Rows of k elements as the lines of one tile.
template <class C, class T>
FASTVIT_INLINE void pack_lines(const T* src, int64_t stride, int64_t rows, int64_t k, unit_t<C>* dst) {
  constexpr int lanes = kLanes<unit_t<C>>, line = kLine<C>;
  for (int64_t begin = 0; begin < k; begin += line)
    for (int64_t i = 0; i < rows; i++, dst += lanes) store(dst, Units<C>::from(src + i * stride + begin, k - begin));
}

// The same from columns, element (row, k) at src[k * stride + row]; `readable` of them may be read, which is faster
// where there are whole vectors.
template <class C, class T>
void pack_columns_as_lines(const T* src, int64_t stride, int64_t rows, int64_t k, unit_t<C>* dst, int64_t readable) {
  using A = unit_t<C>;
  constexpr int lanes = kLanes<A>, per_unit = Units<C>::kPerUnit;
  for (int64_t begin = 0; begin < k; begin += kLine<C>)
    for (int64_t first = 0; first < rows; first += lanes) {
      const int64_t count = rows - first < lanes ? rows - first : lanes;
      Vec<A> r[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++)
        r[i] = Units<C>::beside(src + (begin + i * per_unit) * stride + first, stride, readable - first,
                                k - begin - i * per_unit);
      transpose<A>(r);
      for (int64_t i = 0; i < count; i++, dst += lanes) store(dst, r[i]);
    }
}

// Up to kLanes rows of k elements as a vector's worth of a panel's columns, dst[unit * width + row]; columns without a
// row are zero.
template <class C, class T>
void pack_columns(const T* src, int64_t stride, int64_t rows, int64_t k, unit_t<C>* dst, int64_t width) {
  using A = unit_t<C>;
  constexpr int lanes = kLanes<A>, per_unit = Units<C>::kPerUnit;
  const int64_t units = units_of<C>(k);
  for (int64_t u = 0; u < units; u += lanes) {
    Vec<A> r[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++)
      r[i] = i < rows ? Units<C>::from(src + i * stride + u * per_unit, k - u * per_unit) : Vec<A>{};
    transpose<A>(r);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++)
      if (i < units - u) store(dst + (u + i) * width, r[i]);
  }
}

// The panel of kPanel rows of a weight (N, K) that begins with row n.
template <class C, class T>
void pack_panel(const T* weight, int64_t stride, int64_t n, int64_t rows, int64_t k, unit_t<C>* dst) {
  constexpr int lanes = kLanes<unit_t<C>>;
  for (int v = 0; v < kPanelVectors; v++, n += lanes)
    pack_columns<C>(weight + n * stride, stride, rows - n, k, dst + v * lanes, kPanel<C>);
}

// The panel of kPanel columns, from n on, of a weight that lies as (K, N).
template <class C, class T>
void pack_panel_by_columns(const T* weight, int64_t stride, int64_t n, int64_t columns, int64_t k, unit_t<C>* dst) {
  using A = unit_t<C>;
  constexpr int lanes = kLanes<A>, per_unit = Units<C>::kPerUnit;
  for (int64_t row = 0; row < k; row += per_unit)
    for (int v = 0; v < kPanelVectors; v++, dst += lanes) {
      const int64_t at = n + v * lanes;
      store(dst, at < columns ? Units<C>::beside(weight + row * stride + at, stride, columns - at, k - row) : Vec<A>{});
    }
}

// One chain of roundings is at most this many units long: partial sums are added up, which keeps the error near that of
// a tree. Shorter ones cost time, longer ones leave the L1 cache; to bfloat16 and int8 the roundings are nothing.
template <class C>
constexpr int64_t kChain = Units<C>::kPerUnit == 1 ? 256 : 512;

// Whether products of C go through the tile unit.
template <class C>
bool with_tiles() {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
  if constexpr (Units<C>::kPerUnit > 1) return active_isa() == Isa::amx;
#endif
  return false;
}

// The tile unit reads every operand anew for each tile of rows, so that a chain's part of a panel must leave room in
// the L1 cache: of 64 to 384 units, 128 and 192 were the fastest on one Xeon (1.8 TFLOP/s; 1.3 with 384).
template <class C>
int64_t longest_chain() {
  return with_tiles<C>() ? 192 : kChain<C>;
}

// out[R][out_stride] (+)= a[units as lines of R rows] x b[units][b_stride], and a look ahead at memory used later: two
// cache lines per four units.
template <class C, int R, int NV>
void micro(const unit_t<C>* a, const unit_t<C>* b, int64_t b_stride, int64_t units, unit_t<C>* out, int64_t out_stride,
           bool add, const char* ahead) {
  using A = unit_t<C>;
  constexpr int lanes = kLanes<A>, unroll = lanes < 4 ? lanes : 4;
  Vec<A> sum[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = Vec<A>{};
  const auto step = [&](int64_t lane) __attribute__((always_inline)) {
    Vec<A> column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) column[j] = load(b + j * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sum[i][j] = Units<C>::multiply_add(a[i * lanes + lane], column[j], sum[i][j]);
    b += b_stride;
  };
  for (; units >= lanes; units -= lanes, a += (R - 1) * lanes)
    for (int lane = 0; lane < lanes; lane += unroll, a += unroll) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + 64, 0, 2);
      ahead += 128;
#pragma GCC unroll 4
      for (int u = 0; u < unroll; u++) step(u);
    }
  for (int64_t lane = 0; lane < units; lane++) step(lane);
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      A* p = out + i * out_stride + j * lanes;
      store(p, add ? load(p) + sum[i][j] : sum[i][j]);
    }
}

template <class C>
using Micro = void (*)(const unit_t<C>* a, const unit_t<C>* b, int64_t b_stride, int64_t units, unit_t<C>* out,
                       int64_t out_stride, bool add, const char* ahead);

#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
// The same with whole lines by the tile unit.
template <class C, int R, int NV>
void micro_tiles(const unit_t<C>* a, const unit_t<C>* b, int64_t b_stride, int64_t units, unit_t<C>* out,
                 int64_t out_stride, bool add, const char* ahead) {
  constexpr int64_t lanes = kLanes<unit_t<C>>;
  const int64_t lines = units / lanes, whole = lines * lanes;
  if (lines) multiply_lines<C, NV>(R, a, b, b_stride, lines, out, out_stride, add, ahead);
  if (whole < units || !lines)
    micro<C, R, NV>(a + whole * R, b + whole * b_stride, b_stride, units - whole, out, out_stride, add || lines, ahead);
}
#endif

template <class C, int NV, size_t... R>
Micro<C> micro_of(int64_t rows, std::index_sequence<R...>) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
  if constexpr (Units<C>::kPerUnit > 1) {
    static constexpr Micro<C> tiles[] = {&micro_tiles<C, static_cast<int>(R) + 1, NV>...};
    if (with_tiles<C>()) return tiles[rows - 1];
  }
#endif
  static constexpr Micro<C> table[] = {&micro<C, static_cast<int>(R) + 1, NV>...};
  return table[rows - 1];
}

// The register tile for a number of rows in [1, kTileRows]. Whoever calls it has a TileUnit.
template <class C, int NV>
Micro<C> micro_of(int64_t rows) {
  return micro_of<C, NV>(rows, std::make_index_sequence<kTileRows>{});
}
