#pragma once

#include <cstddef>
#include <cstdint>

namespace fastvit {

// Calls fn(context, begin, end) on disjoint ranges that cover [0, items), on PyTorch's own threads.
void parallel_ranges(int64_t items, int64_t grain, void (*fn)(const void* context, int64_t begin, int64_t end),
                     const void* context);
int64_t thread_count();

template <class F>
void parallel_for(int64_t items, int64_t grain, const F& f) {
  parallel_ranges(
      items, grain,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
}

// Calls f(first, rows) on blocks of m rows of a matrix product: enough rows to pay for packing the weight, few enough
// to stay in the caches. With plenty of rows every thread works through blocks of its own, and what f would do in
// parallel runs in that thread; with few rows the blocks come one by one and f shares out the columns.
template <class F>
void for_row_blocks(int64_t m, const F& f) {
  constexpr int64_t kBlockRows = 448, kRowsPerThread = 320;
  const int64_t threads = thread_count(), owners = m >= threads * kRowsPerThread ? threads : 1;
  const int64_t blocks = owners * ((m + owners * kBlockRows - 1) / (owners * kBlockRows));
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) f(m * b / blocks, m * (b + 1) / blocks - m * b / blocks);
  };
  if (owners > 1)
    parallel_for(blocks, 1, run);
  else
    run(0, blocks);
}

// Uninitialised memory, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

}  // namespace fastvit
