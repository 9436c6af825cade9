#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <new>

namespace fastvit {

void parallel_ranges(int64_t items, int64_t grain, void (*fn)(const void* context, int64_t begin, int64_t end),
                     const void* context) {
  if (items <= 0) return;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

Scratch::Scratch(size_t bytes) : data_(::operator new(bytes, std::align_val_t{64})) {}

Scratch::~Scratch() { ::operator delete(data_, std::align_val_t{64}); }

}  // namespace fastvit
