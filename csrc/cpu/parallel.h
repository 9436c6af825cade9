#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fastvit {

// Calls fn(context, begin, end) on disjoint ranges that cover [0, items), on PyTorch's own threads.
void parallel_ranges(int64_t items, int64_t grain, void (*fn)(const void* context, int64_t begin, int64_t end),
                     const void* context);
int64_t thread_count();
// Lets another thread run, or this core rest, while a thread waits for the `turn`-th time.
void wait_a_little(int turn);
// Bytes of the cache that one core has for itself.
int64_t l2_bytes();

template <class F>
void parallel_for(int64_t items, int64_t grain, const F& f) {
  parallel_ranges(
      items, grain,
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
}

// Uninitialised memory, aligned to a cache line, from a stack that its thread keeps: the pages of a first call serve
// the next ones. Objects of one thread must die in reverse order.
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
  size_t bytes_;
  bool own_;
};

// Threads that go through the same steps. The items of a step are claimed one by one, each lane's own share first, and
// the step ends when all are done, whoever did them: a lane that comes late, or never, holds nobody up, so that any
// number of real threads, one included, may serve the lanes.
class Team {
 public:
  Team(int64_t lanes, int64_t steps);

  // One lane's way through the steps.
  class Worker {
   public:
    Worker(Team& team, int64_t lane) : team_(team), lane_(lane) {}
    int64_t lane() const { return lane_; }
    // How many share each step: 1 when this thread goes its way alone.
    int64_t lanes() const { return team_.lanes_; }

    template <class F>
    void each(int64_t items, const F& f) {
      if (team_.lanes_ == 1) {
        for (int64_t i = 0; i < items; i++) f(i);
        return;
      }
      const int64_t lanes = team_.lanes_;
      std::atomic<int64_t>* claimed = team_.counters(step_);
      int64_t done = 0;
      for (int64_t turn = 0; turn < lanes; turn++) {
        const int64_t share = (lane_ + turn) % lanes, begin = items * share / lanes;
        const int64_t count = items * (share + 1) / lanes - begin;
        std::atomic<int64_t>& next = claimed[share * kApart];
        while (next.load(std::memory_order_relaxed) < count) {
          const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
          if (i >= count) break;
          f(begin + i);
          done++;
        }
      }
      std::atomic<int64_t>& finished = claimed[lanes * kApart];
      if (done) finished.fetch_add(done, std::memory_order_acq_rel);
      for (int turn = 0; finished.load(std::memory_order_acquire) < items; turn++) wait_a_little(turn);
      step_++;
    }

   private:
    Team& team_;
    int64_t lane_, step_ = 0;
  };

 private:
  static constexpr int64_t kApart = 64 / sizeof(std::atomic<int64_t>);
  std::atomic<int64_t>* counters(int64_t step) const {
    return memory_.as<std::atomic<int64_t>>() + step * (lanes_ + 1) * kApart;
  }

  int64_t lanes_;
  Scratch memory_;
};

// Calls f(worker, begin, end) so that the ranges cover [0, units). As many units as divide evenly among the threads are
// done by one thread each, which keeps what it works on in its cache; the others by all threads together, each unit
// with no more than `steps` steps.
template <class F>
void for_each_unit(int64_t units, int64_t steps, const F& f) {
  const int64_t threads = thread_count(), alone = units / threads * threads;
  Team team(threads, units > alone ? steps : 0), solo(1, 0);
  std::atomic<int64_t> next{0};
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; lane++) {
      for (int64_t unit; next.load(std::memory_order_relaxed) < alone;) {
        if ((unit = next.fetch_add(1, std::memory_order_relaxed)) >= alone) break;
        Team::Worker worker(solo, lane);
        f(worker, unit, unit + 1);
      }
      if (units > alone) {
        Team::Worker worker(team, lane);
        f(worker, alone, units);
      }
    }
  });
}

}  // namespace fastvit
