#include "cpu/tiles.h"

#include "common/dtype.h"

#if FASTVIT_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastvit {

#if FASTVIT_TILES

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Assembly, since GCC 12's intrinsics take no register number from a template and forget that memory is read.
inline void shape(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void release() { asm volatile("tilerelease" : : : "memory"); }
template <int T>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <class C, int Sum, int A, int B>
inline void multiply_add() {
  if constexpr (sizeof(C) == 1)
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
  else
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
}

// The tiles of a product differ by a row at most. So there are two sets of registers, 0 to 2 for `rows` rows and 3 to 5
// for one less, beside 6 and 7 for b.
constexpr int kMostRows = 15;
struct Configs {
  TileConfig of[kMostRows + 1];
  constexpr Configs() {
    for (int rows = 1; rows <= kMostRows; rows++)
      for (int t = 0; t < 6; t++) of[rows].rows[t] = static_cast<uint8_t>(t < 3 || rows == 1 ? rows : rows - 1);
  }
};
constexpr Configs kConfigs;

thread_local int64_t shaped_rows = 0;

template <class C, int NV, int First>
void multiply_lines_with(int64_t rows, const char* a, const char* b, int64_t b_bytes, int64_t lines, char* out,
                         int64_t out_bytes, bool add, const char* ahead) {
  if (add) {
    load<First>(out, out_bytes);
    if (NV > 1) load<First + 1>(out + 64, out_bytes);
  } else {
    zero<First>();
    if (NV > 1) zero<First + 1>();
  }
  const bool fetch = ahead != b;
  for (; lines > 0; lines--, a += rows * 64, b += 16 * b_bytes) {
    load<First + 2>(a, 64);
    load<6>(b, b_bytes);
    multiply_add<C, First, First + 2, 6>();
    if (NV > 1) {
      load<7>(b + 64, b_bytes);
      multiply_add<C, First + 1, First + 2, 7>();
    }
    if (!fetch) continue;
    for (int i = 0; i < 8; i++) __builtin_prefetch(ahead + i * 64, 0, 2);
    ahead += 512;
  }
  store<First>(out, out_bytes);
  if (NV > 1) store<First + 1>(out + 64, out_bytes);
}

bool detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned all = kBfloat16 | kTile | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & all) == all && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

template <class C>
float multiply_tiles(int64_t steps) {
  static constexpr TileConfig kWhole;
  shape(kWhole);
  for (int64_t step = 0; step < steps; step++) {
    multiply_add<C, 0, 4, 6>();
    multiply_add<C, 1, 4, 7>();
    multiply_add<C, 2, 5, 6>();
    multiply_add<C, 3, 5, 7>();
  }
  alignas(64) float sum[256];
  store<0>(sum, 64);
  release();
  return sum[0];
}

}  // namespace

bool has_tiles() {
  static const bool found = detect();
  return found;
}

TileUnit::~TileUnit() {
  if (shaped_rows) release();
  shaped_rows = 0;
}

template <class C, int NV>
void multiply_lines(int64_t rows, const void* a, const void* b, int64_t b_stride, int64_t lines, void* out,
                    int64_t out_stride, bool add, const char* ahead) {
  int64_t& shaped = shaped_rows;
  if (shaped != rows && shaped != rows + 1) shape(kConfigs.of[shaped = rows]);
  const auto multiply = shaped == rows ? multiply_lines_with<C, NV, 0> : multiply_lines_with<C, NV, 3>;
  multiply(rows, static_cast<const char*>(a), static_cast<const char*>(b), b_stride * 4, lines, static_cast<char*>(out),
           out_stride * 4, add, ahead);
}

float multiply_tiles_bfloat16(int64_t steps) { return multiply_tiles<bfloat16>(steps); }
float multiply_tiles_int8(int64_t steps) { return multiply_tiles<int8_t>(steps); }

#else

bool has_tiles() { return false; }
TileUnit::~TileUnit() = default;
template <class C, int NV>
void multiply_lines(int64_t, const void*, const void*, int64_t, int64_t, void*, int64_t, bool, const char*) {}
float multiply_tiles_bfloat16(int64_t) { return 0; }
float multiply_tiles_int8(int64_t) { return 0; }

#endif

#define FASTVIT_INSTANTIATE(C, NV)                                                                               \
  template void multiply_lines<C, NV>(int64_t, const void*, const void*, int64_t, int64_t, void*, int64_t, bool, \
                                      const char*)
FASTVIT_INSTANTIATE(bfloat16, 1);
FASTVIT_INSTANTIATE(bfloat16, 2);
FASTVIT_INSTANTIATE(int8_t, 1);
FASTVIT_INSTANTIATE(int8_t, 2);

}  // namespace fastvit
