#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "common/check.h"

namespace fastvit {
namespace {

constexpr int64_t kSamples = 16;

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 29);
}

// In-place changes through `.data` leave a tensor's version as it was; a few of its elements give them away.
int64_t fingerprint(std::vector<Tensor> tensors, bool addresses) {
  uint64_t hash = 1;
  for (const Tensor& t : tensors) {
    FASTVIT_CHECK(t.is_cpu(), "fingerprint: the tensors must be on the CPU");
    const char* const data = static_cast<const char*>(t.const_data_ptr());
    if (addresses) hash = mixed(hash, reinterpret_cast<uintptr_t>(data));
    if (t.numel() == 0 || !t.is_contiguous()) continue;
    const int64_t size = t.element_size(), bytes = t.numel() * size, word = bytes < 8 ? bytes : 8;
    for (int64_t i = 0; i < kSamples; i++) {
      uint64_t value = 0;
      std::memcpy(&value, data + (bytes - word) / size * i / (kSamples - 1) * size, word);
      hash = mixed(hash, value);
    }
  }
  return static_cast<int64_t>(hash >> 1);
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fastvit::fingerprint)); }
