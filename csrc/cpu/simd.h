// Vectors of one instruction set: GCC's vector types for the arithmetic, intrinsics where they have no word for it.
// Included by kernel files inside the namespace of an instruction set (foreach_isa.h), hence no include guard.

#undef FASTVIT_VECTOR_BYTES
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
#define FASTVIT_VECTOR_BYTES 64
#elif FASTVIT_ISA == FASTVIT_ISA_AVX2
#define FASTVIT_VECTOR_BYTES 32
#else
#define FASTVIT_VECTOR_BYTES 16
#endif

#undef FASTVIT_INLINE
#define FASTVIT_INLINE inline __attribute__((always_inline))

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FASTVIT_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FASTVIT_VECTOR_BYTES)));
};

template <>
struct VecOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(FASTVIT_VECTOR_BYTES)));
};

template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = FASTVIT_VECTOR_BYTES / static_cast<int>(sizeof(A));

using VecI = Vec<int32_t>;
typedef uint32_t VecU __attribute__((vector_size(FASTVIT_VECTOR_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(FASTVIT_VECTOR_BYTES / 2)));

template <class V, class P>
FASTVIT_INLINE V load_bits(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class To, class From>
FASTVIT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
FASTVIT_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

FASTVIT_INLINE Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
FASTVIT_INLINE Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
FASTVIT_INLINE Vec<int32_t> load(const int32_t* p) { return load_bits<Vec<int32_t>>(p); }
FASTVIT_INLINE Vec<float> load(const bfloat16* p) {
  return bit_cast<Vec<float>>(__builtin_convertvector(load_bits<VecU16>(p), VecU) << 16);
}

FASTVIT_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
FASTVIT_INLINE void store(int32_t* p, Vec<int32_t> v) { std::memcpy(p, &v, sizeof(v)); }
FASTVIT_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
FASTVIT_INLINE void store(bfloat16* p, Vec<float> v) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512_BF16
  const auto bits = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &bits, sizeof(bits));
#else
  VecU u = bit_cast<VecU>(v);
  VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VecU16 bits = __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40u, VecU16);
  std::memcpy(p, &bits, sizeof(bits));
#endif
}

#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
FASTVIT_INLINE Vec<float> load(const float16* p) { return _mm512_cvtph_ps(load_bits<__m256i>(p)); }
FASTVIT_INLINE void store(float16* p, Vec<float> v) {
  __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &bits, sizeof(bits));
}
#elif FASTVIT_ISA == FASTVIT_ISA_AVX2
FASTVIT_INLINE Vec<float> load(const float16* p) { return _mm256_cvtph_ps(load_bits<__m128i>(p)); }
FASTVIT_INLINE void store(float16* p, Vec<float> v) {
  __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &bits, sizeof(bits));
}
#else
FASTVIT_INLINE Vec<float> load(const float16* p) {
  // Shifted into place, a half is a float whose exponent is off by 112: one exact multiplication repairs normals and
  // denormals alike.
  VecU u = __builtin_convertvector(load_bits<VecU16>(p), VecU);
  Vec<float> magnitude = bit_cast<Vec<float>>((u & 0x7fffu) << 13) * 0x1p112f;
  VecU bits = bit_cast<VecU>(magnitude);
  bits = (u & 0x7c00u) == 0x7c00u ? bits | 0x7f800000u : bits;
  return bit_cast<Vec<float>>(bits | ((u & 0x8000u) << 16));
}
FASTVIT_INLINE void store(float16* p, Vec<float> v) {
  VecU u = bit_cast<VecU>(v);
  VecU sign = (u >> 16) & 0x8000u;
  VecU a = u & 0x7fffffffu;
  // Adding 0.5 to a value below 2^-14 leaves the rounded half denormal in the low bits of the sum.
  VecU denormal = bit_cast<VecU>(bit_cast<Vec<float>>(a) + 0.5f) - 0x3f000000u;
  VecU normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  VecU half = a < 0x38800000u ? denormal : normal;
  half = a >= 0x477ff000u ? VecU{} + 0x7c00u : half;
  half = a > 0x7f800000u ? VecU{} + 0x7e00u : half;
  VecU16 bits = __builtin_convertvector(half | sign, VecU16);
  std::memcpy(p, &bits, sizeof(bits));
}
#endif

// The first n < kLanes elements; the other lanes are zero, and no byte beyond the n is touched.
template <class T>
FASTVIT_INLINE Vec<accumulator_t<T>> load(const T* p, int64_t n) {
  constexpr int lanes = kLanes<accumulator_t<T>>;
  if (n >= lanes) return load(p);
  T buffer[lanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
FASTVIT_INLINE void store(T* p, Vec<accumulator_t<T>> v, int64_t n) {
  constexpr int lanes = kLanes<accumulator_t<T>>;
  if (n >= lanes) return store(p, v);
  T buffer[lanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// f of all lanes, in pairs.
template <class A, class F>
FASTVIT_INLINE A fold(Vec<A> v, const F& f) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = f(lanes[i], lanes[i + width]);
  return lanes[0];
}

template <class A>
FASTVIT_INLINE A sum_of(Vec<A> v) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps(v);
#endif
  return fold<A>(v, [](A a, A b) { return a + b; });
}

template <class A>
FASTVIT_INLINE A max_of(Vec<A> v) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
  if constexpr (sizeof(A) == 4) return _mm512_reduce_max_ps(v);
#endif
  return fold<A>(v, [](A a, A b) { return a > b ? a : b; });
}

template <class A, size_t... I>
FASTVIT_INLINE Vec<A> lane_numbers(std::index_sequence<I...>) {
  return Vec<A>{A(I)...};
}

// The first n lanes, and `value` in the others.
template <class A>
FASTVIT_INLINE Vec<A> fill_beyond(Vec<A> v, int64_t n, A value) {
  return lane_numbers<A>(std::make_index_sequence<kLanes<A>>{}) < A(n) ? v : Vec<A>{} + value;
}

// Four vectors of numbers in [0, 255], rounded to nearest even, as bytes; others saturate.
FASTVIT_INLINE void store_bytes(uint8_t* p, const Vec<float>* v) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(v[0]), _mm512_cvtps_epi32(v[1]));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(v[2]), _mm512_cvtps_epi32(v[3]));
  // The packing instructions work within 16 bytes, so the groups of four bytes end up among one another.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
  std::memcpy(p, &bytes, sizeof(bytes));
#else
  for (int part = 0; part < 4; part++, p += kLanes<float>) {
    Vec<float> x = v[part] > 0.0f ? v[part] : Vec<float>{};
    x = x < 255.0f ? x : Vec<float>{} + 255.0f;
    const VecI rounded = bit_cast<VecI>(x + 12582912.0f) - 0x4b400000;
    for (int i = 0; i < kLanes<float>; i++) p[i] = static_cast<uint8_t>(rounded[i]);
  }
#endif
}

template <class A>
FASTVIT_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// a * b + c with a single rounding where the hardware has it.
FASTVIT_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif FASTVIT_ISA == FASTVIT_ISA_AVX2
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FASTVIT_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if FASTVIT_ISA >= FASTVIT_ISA_AVX512
  return _mm512_fmadd_pd(a, b, c);
#elif FASTVIT_ISA == FASTVIT_ISA_AVX2
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}
