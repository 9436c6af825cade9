#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <new>
#include <thread>

namespace fastvit {
namespace {

constexpr std::align_val_t kAlignment{64};
// Beyond this a thread keeps nothing; 0 shows a memory checker where each Scratch begins and ends.
#ifndef FASTVIT_SCRATCH_KEPT
#define FASTVIT_SCRATCH_KEPT (size_t{256} << 20)
#endif
constexpr size_t kKept = FASTVIT_SCRATCH_KEPT;

struct Arena {
  char* base = nullptr;
  size_t size = 0, used = 0;
  size_t live = 0, most = 0;  // what is out now, and was at once; both count what did not fit
  ~Arena() { ::operator delete(base, kAlignment); }
};

Arena& arena() {
  static thread_local Arena mine;
  return mine;
}

}  // namespace

void parallel_ranges(int64_t items, int64_t grain, void (*fn)(const void* context, int64_t begin, int64_t end),
                     const void* context) {
  if (items <= 0) return;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

void wait_a_little(int turn) {
  if (turn >= 4096) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found >= 262144) return found;
#endif
  return 524288;
}

Scratch::Scratch(size_t bytes) : bytes_((bytes + 127) / 64 * 64) {
  Arena& a = arena();
  const size_t kept = a.most < kKept ? a.most : kKept, wanted = kept > bytes_ ? kept : bytes_;
  if (a.live == 0 && a.size < wanted && wanted <= kKept) {
    ::operator delete(a.base, kAlignment);
    a.base = nullptr;
    a.size = 0;
    a.base = static_cast<char*>(::operator new(wanted, kAlignment));
    a.size = wanted;
  }
  own_ = a.size - a.used < bytes_;
  data_ = own_ ? ::operator new(bytes_, kAlignment) : a.base + a.used;
  if (!own_) a.used += bytes_;
  a.live += bytes_;
  if (a.live > a.most) a.most = a.live;
}

Scratch::~Scratch() {
  Arena& a = arena();
  a.live -= bytes_;
  if (own_)
    ::operator delete(data_, kAlignment);
  else
    a.used -= bytes_;
}

Team::Team(int64_t lanes, int64_t steps)
    : lanes_(lanes), memory_(lanes > 1 ? steps * (lanes + 1) * kApart * sizeof(std::atomic<int64_t>) : 0) {
  auto* counter = memory_.as<std::atomic<int64_t>>();
  for (int64_t i = 0; lanes > 1 && i < steps * (lanes + 1) * kApart; i++) new (counter + i) std::atomic<int64_t>(0);
}

}  // namespace fastvit
