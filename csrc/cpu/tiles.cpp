#include "cpu/tiles.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTVIT_TILES 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define FASTVIT_TILES 0
#endif

namespace fastvit {

#if FASTVIT_TILES

namespace {

#define FASTVIT_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

FASTVIT_AMX void begin() {
  const TileConfig config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

FASTVIT_AMX float end() {
  alignas(64) float sum[256];
  _tile_stored(0, sum, 64);
  _tile_release();
  return sum[0];
}

bool detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned all = kBfloat16 | kTile | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & all) == all && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_tiles() {
  static const bool found = detect();
  return found;
}

FASTVIT_AMX float multiply_tiles_bfloat16(int64_t steps) {
  begin();
  for (int64_t step = 0; step < steps; step++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return end();
}

FASTVIT_AMX float multiply_tiles_int8(int64_t steps) {
  begin();
  for (int64_t step = 0; step < steps; step++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  return end();
}

#else

bool has_tiles() { return false; }
float multiply_tiles_bfloat16(int64_t) { return 0; }
float multiply_tiles_int8(int64_t) { return 0; }

#endif

}  // namespace fastvit
