#include "cpu/simd.h"
#include "cpu/micro.h"

// Multiply-adds on registers alone, as many independent ones as a product's tile has; answers one of the sums.
template <class P>
float multiply_registers(int64_t steps) {
  using C = compute_t<P>;
  using A = unit_t<C>;
  Vec<A> sum[kTileRows][kPanelVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; j++) {
      sum[i][j] = Vec<A>{};
      asm volatile("" : "+x"(sum[i][j]));  // or the compiler would see that all sums are the same
    }
  Vec<A> b{};
  A a{};
  for (int64_t step = 0; step < steps; step++) {
    // Nor are all steps; a comes from memory as in a product, for to spread it from a register takes one of two units.
    asm volatile("" : "+x"(b), "+m"(a));
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; j++) sum[i][j] = Units<C>::multiply_add(a, b, sum[i][j]);
  }
  Vec<A> total{};
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; j++) total += sum[i][j];
  return static_cast<float>(total[0]);
}

// Floating-point operations of one step.
template <class P>
int64_t operations() {
  using C = compute_t<P>;
  return 2 * kTileRows * kPanel<C> * Units<C>::kPerUnit;
}
