#include <torch/csrc/stable/library.h>

#include <atomic>
#include <chrono>
#include <string>

#include "common/check.h"

#define FASTVIT_KERNELS "cpu/peak_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr int64_t kSteps = 200000;

template <class P>
double peak() {
  const auto multiply = FASTVIT_SELECT(multiply_registers<P>);
  const int64_t threads = thread_count();
  std::atomic<float> keep{0};
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) keep = multiply(kSteps);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(FASTVIT_SELECT(operations<P>)() * kSteps * threads) / seconds.count() / 1e9;
}

double cpu_peak(std::string compute) {
  if (compute == "float32") return peak<float>();
  if (compute == "bfloat16") return peak<bfloat16>();
  if (compute == "float64") return peak<double>();
  if (compute == "int8") return peak<int8_t>();
  FASTVIT_CHECK(false, "cpu_peak: compute must be float32, bfloat16, float64 or int8, got ", compute);
  return 0;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_peak", TORCH_BOX(&fastvit::cpu_peak));
}
