#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>

#include "common/check.h"
#include "cpu/tiles.h"

#define FASTVIT_KERNELS "cpu/peak_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

// Some milliseconds: to wake the threads takes a tenth of one.
constexpr int64_t kSteps = 1000000;

// GFLOP/s of a function that does so many operations a step, run by every thread.
double rate(float (*multiply)(int64_t), int64_t operations) {
  const int64_t threads = thread_count();
  std::atomic<float> keep{0};
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) keep = multiply(kSteps);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(operations * kSteps * threads) / seconds.count() / 1e9;
}

template <class P>
double peak() {
  return rate(FASTVIT_SELECT(multiply_registers<P>), FASTVIT_SELECT(operations<P>)());
}

// With the tile unit where there is one: it is what the machine can do, also while FASTVIT_CPU turns it off.
double peak_with_tiles(double registers, float (*multiply)(int64_t), int64_t operations) {
  return has_tiles() ? std::max(registers, rate(multiply, operations)) : registers;
}

double cpu_peak(std::string compute) {
  if (compute == "float32") return peak<float>();
  if (compute == "bfloat16") return peak_with_tiles(peak<bfloat16>(), multiply_tiles_bfloat16, 4 * 2 * 16 * 16 * 32);
  if (compute == "float64") return peak<double>();
  if (compute == "int8") return peak_with_tiles(peak<int8_t>(), multiply_tiles_int8, 4 * 2 * 16 * 16 * 64);
  FASTVIT_CHECK(false, "cpu_peak: compute must be float32, bfloat16, float64 or int8, got ", compute);
  return 0;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_peak", TORCH_BOX(&fastvit::cpu_peak));
}
