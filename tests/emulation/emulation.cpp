// The scheduler of cuda_runtime.h.
#include "cuda_runtime.h"

#include <cmath>
#include <cstdio>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastvit::cuda {
// What `extern __shared__` names; the guard lies behind it.
alignas(128) unsigned char dynamic_shared[emulated::kShared + 1024];
}  // namespace fastvit::cuda

namespace emulated {
namespace {

using fastvit::cuda::dynamic_shared;

#if defined(__x86_64__)
// Saves what a call must save on this stack and goes on where the other stack was left.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

struct Context {
  void* stack = nullptr;

  void start(char* memory, size_t size, void (*entry)()) {
    auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(memory) + size) & ~uintptr_t{15});
    *--top = nullptr;  // as if the entry had been called: its stack is 8 off 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack = top;
  }
  static void change(Context& from, Context& to) { emulated_switch(&from.stack, to.stack); }
};
#else
struct Context {
  ucontext_t context;

  void start(char* memory, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = memory;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

constexpr size_t kStack = 64 * 1024;
constexpr uint32_t kGuard = 0x7fc0dead;  // a NaN of float and of both halves

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = true;
  const int* waiting = nullptr;  // for this counter to leave `seen`
  int seen = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

struct Warp {
  const char* what = nullptr;
  int arrived = 0, turn = 0;
  alignas(16) char in[32 * kOperands];
  alignas(16) char out[32 * kOperands];
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
  int current = 0, arrived = 0, turn = 0, vote = 0, alive = 0, block_vote = 0;
  size_t shared = 0;
  bool copies_at_once = false;
  const char* error = nullptr;
};

Machine machine;
std::mutex one_launch_at_a_time;
std::mt19937 order(0);

void resume(int index) {
  machine.current = index;
  threadIdx.x = static_cast<unsigned>(index);
  Context::change(machine.scheduler, machine.threads[static_cast<size_t>(index)].context);
}

void pause_until_changed(const int& counter) {
  Thread& mine = machine.threads[static_cast<size_t>(machine.current)];
  mine.waiting = &counter;
  mine.seen = counter;
  Context::change(mine.context, machine.scheduler);
  mine.waiting = nullptr;
}

void entry() {
  (*machine.kernel)();
  Thread& mine = machine.threads[static_cast<size_t>(machine.current)];
  mine.done = true;
  machine.alive--;
  Context::change(mine.context, machine.scheduler);
}

void arrive(const Copy& copy) { copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16); }

bool ready(const Thread& t) { return !t.done && (!t.waiting || *t.waiting != t.seen); }

// Lanes of a warp by turns, until none can go on.
bool run_warp(int warp, bool backwards) {
  bool any = false, moved = true;
  while (moved && !machine.error) {
    moved = false;
    for (int i = 0; i < 32 && !machine.error; i++) {
      const int index = warp * 32 + (backwards ? 31 - i : i);
      if (!ready(machine.threads[static_cast<size_t>(index)])) continue;
      resume(index);
      moved = any = true;
    }
  }
  return any;
}

void fill_shared() {
  auto* words = reinterpret_cast<uint32_t*>(dynamic_shared);
  for (size_t i = 0; i < sizeof(dynamic_shared) / 4; i++) words[i] = kGuard;
}

void run_block(int threads) {
  machine.arrived = machine.turn = machine.vote = 0;
  machine.alive = threads;
  machine.copies_at_once = order() % 2;
  fill_shared();
  for (int i = 0; i < threads; i++) {
    Thread& t = machine.threads[static_cast<size_t>(i)];
    t.done = false;
    t.waiting = nullptr;
    t.open.clear();
    t.committed.clear();
    t.context.start(t.stack.get(), kStack, entry);
  }
  for (Warp& warp : machine.warps) warp.arrived = warp.turn = 0;
  std::vector<int> turns;
  for (int w = 0; w < threads / 32; w++) turns.push_back(w);
  while (machine.alive && !machine.error) {
    std::shuffle(turns.begin(), turns.end(), order);
    bool moved = false;
    for (const int warp : turns) moved = run_warp(warp, order() % 2) || moved;
    if (!moved && !machine.error) machine.error = "threads wait for ever: not all of them meet at a barrier";
  }
  const auto* words = reinterpret_cast<const uint32_t*>(dynamic_shared);
  for (size_t i = (machine.shared + 3) / 4; i < sizeof(dynamic_shared) / 4 && !machine.error; i++)
    if (words[i] != kGuard) machine.error = "shared memory was written behind its end";
}

}  // namespace

void fail(const char* what) {
  machine.error = what;
  Context abandoned;
  Context::change(abandoned, machine.scheduler);
  __builtin_unreachable();
}

void meet(const char* what, const void* mine, void* result, size_t size, void (*all)(const void*, void*)) {
  Warp& warp = machine.warps[static_cast<size_t>(machine.current / 32)];
  const int lane = machine.current % 32;
  if (warp.arrived && std::strcmp(warp.what, what)) fail("lanes of a warp meet in different collectives");
  warp.what = what;
  std::memcpy(warp.in + static_cast<size_t>(lane) * size, mine, size);
  if (++warp.arrived == 32) {
    all(warp.in, warp.out);
    warp.arrived = 0;
    warp.turn++;
  } else {
    pause_until_changed(warp.turn);
  }
  std::memcpy(result, warp.out + static_cast<size_t>(lane) * size, size);
}

void meet_block(int* vote) {
  machine.vote |= *vote != 0;
  if (++machine.arrived == static_cast<int>(machine.threads.size())) {
    machine.arrived = 0;
    machine.block_vote = machine.vote;
    machine.vote = 0;
    machine.turn++;
  } else {
    pause_until_changed(machine.turn);
  }
  *vote = machine.block_vote;
}

void check_shared(const void* p, size_t alignment, const char*) {
  const auto address = reinterpret_cast<uintptr_t>(p), start = reinterpret_cast<uintptr_t>(dynamic_shared);
  if (address % alignment) fail("an address in shared memory is not aligned");
  if (address < start || address + alignment > start + machine.shared) fail("an address is not in shared memory");
}

void copy_later(void* shared, const void* global) {
  const Copy copy{shared, global};
  machine.copies_at_once ? arrive(copy) : machine.threads[static_cast<size_t>(machine.current)].open.push_back(copy);
}

void commit_copies() {
  Thread& mine = machine.threads[static_cast<size_t>(machine.current)];
  mine.committed.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_for_copies(int pending) {
  Thread& mine = machine.threads[static_cast<size_t>(machine.current)];
  while (static_cast<int>(mine.committed.size()) > pending) {
    for (const Copy& copy : mine.committed.front()) arrive(copy);
    mine.committed.pop_front();
  }
}

const char* run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (shared > static_cast<size_t>(shared_per_block)) return "more shared memory than a block may have";
  if (block.x % 32 || block.x > 1024 || block.y * block.z != 1) return "blocks must be whole warps in one dimension";
  if (!grid.x || grid.y > 65535 || grid.z > 65535) return "no such grid";
  machine.error = nullptr;
  machine.kernel = &kernel;
  machine.shared = shared;
  if (machine.threads.size() != block.x) {
    machine.threads = std::vector<Thread>(block.x);
    machine.warps = std::vector<Warp>(block.x / 32);
  }
  const dim3 outer[] = {threadIdx, blockIdx, blockDim, gridDim};
  gridDim = grid;
  blockDim = block;
  threadIdx = {};
  for (unsigned z = 0; z < grid.z && !machine.error; z++)
    for (unsigned y = 0; y < grid.y && !machine.error; y++)
      for (unsigned x = 0; x < grid.x && !machine.error; x++) {
        blockIdx = {x, y, z};
        run_block(static_cast<int>(block.x));
      }
  threadIdx = outer[0], blockIdx = outer[1], blockDim = outer[2], gridDim = outer[3];
  return machine.error;
}

}  // namespace emulated

extern "C" void emulated_device(int processors, int shared_per_block) {
  emulated::processors = processors;
  emulated::shared_per_block = shared_per_block;
}
