#pragma once

// The matrix unit of newer Intel processors, AMX: its registers are tiles of 16 rows of 64 bytes.

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTVIT_TILES 1
#else
#define FASTVIT_TILES 0
#endif

namespace fastvit {

// Whether this processor has it and the system lets this process use it.
bool has_tiles();

// While one lives, this thread's tiles keep the shape that a product gave them, which takes as long as a small product.
// None may outlive its kernel: oneDNN shapes them too, on the same threads.
class TileUnit {
 public:
  TileUnit() = default;
  ~TileUnit();
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// out[rows][out_stride] (+)= a[lines][rows][16] x b[lines * 16][b_stride], NV * 16 columns of it, at most 15 rows; a
// and b in units of four bytes, which are two bfloat16 each, or four unsigned bytes of a and four signed ones of b.
// What lies ahead is fetched, eight cache lines per line, unless it is b itself. For C = bfloat16 and int8_t, NV = 1
// and 2.
template <class C, int NV>
void multiply_lines(int64_t rows, const void* a, const void* b, int64_t b_stride, int64_t lines, void* out,
                    int64_t out_stride, bool add, const char* ahead);

// What the unit reaches on its own registers, four sums at a time.
float multiply_tiles_bfloat16(int64_t steps);
float multiply_tiles_int8(int64_t steps);

}  // namespace fastvit
