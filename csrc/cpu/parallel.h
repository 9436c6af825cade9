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
