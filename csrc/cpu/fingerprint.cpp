#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "cpu/isa.h"

namespace fastvit {
namespace {

constexpr int64_t kSamples = 16;

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 29);
}

// Where the element lies that is number `index` in order.
int64_t offset_of(const Tensor& t, int64_t index) {
  int64_t offset = 0;
  for (int64_t d = t.dim() - 1; d >= 0; d--) {
    offset += index % t.size(d) * t.stride(d);
    index /= t.size(d);
  }
  return offset;
}

// In-place changes through `.data` leave a tensor's version as it was; a few of its elements give them away. With
// addresses it is also that of the instruction set, which decides how weights are packed.
int64_t fingerprint(std::vector<Tensor> tensors, bool addresses) {
  uint64_t hash = addresses ? mixed(1, static_cast<uint64_t>(active_isa())) : 1;
  for (const Tensor& t : tensors) {
    FASTVIT_CHECK(t.is_cpu(), "fingerprint: the tensors must be on the CPU");
    const char* const data = static_cast<const char*>(t.const_data_ptr());
    if (addresses) hash = mixed(hash, reinterpret_cast<uintptr_t>(data));
    const int64_t size = t.element_size(), count = t.numel();
    if (count == 0) continue;
    const bool contiguous = t.is_contiguous();
    // Of a contiguous tensor eight bytes at a time, of another one an element.
    const int64_t word = std::min<int64_t>(8, contiguous ? count * size : size);
    const int64_t last = contiguous ? (count * size - word) / size : count - 1;
    for (int64_t i = 0; i < kSamples; i++) {
      const int64_t index = last * i / (kSamples - 1);
      uint64_t value = 0;
      std::memcpy(&value, data + (contiguous ? index : offset_of(t, index)) * size, word);
      hash = mixed(hash, value);
    }
  }
  return static_cast<int64_t>(hash >> 1);
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fastvit::fingerprint)); }
