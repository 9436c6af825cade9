// Runs device code on a CPU: a thread per CUDA thread, barriers for __syncthreads and the warp's shuffles. It proves
// indexing and arithmetic; races and speed are for a GPU to show.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned x = 0;
};
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;

struct Block {
  explicit Block(int threads) : all(threads), exchange(threads) {
    for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
  std::barrier<> all;
  std::vector<float> exchange;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
};
inline Block* block = nullptr;

inline void __syncthreads() { block->all.arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float v, int mask) {
  auto& warp = *block->warps[threadIdx.x / 32];
  block->exchange[threadIdx.x] = v;
  warp.arrive_and_wait();
  const float other = block->exchange[threadIdx.x ^ mask];
  warp.arrive_and_wait();
  return other;
}

template <class Kernel>
void launch_on_threads(unsigned blocks, unsigned threads, const Kernel& kernel) {
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; b++) {
    Block state(threads);
    block = &state;
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; t++)
      running.emplace_back([&, t] {
        threadIdx.x = t;
        blockIdx.x = b;
        kernel();
      });
    for (auto& thread : running) thread.join();
  }
}
