// Runs device code on a CPU, one fiber per CUDA thread: a block at a time, a warp until all its lanes wait for others.
//
// Shared memory begins as NaN and has guards behind it. Asynchronous copies arrive at once in some blocks, in others
// when their thread waits for them and no sooner. Lanes that meet in different collectives, or wait for ever, are an
// error of the launch. What threads do between barriers is not interleaved, but warps and lanes take turns in changing
// orders.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <cmath>
#include <functional>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using std::max;
using std::min;

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr size_t kOperands = 64;        // bytes that a lane brings to a collective
constexpr size_t kShared = 227 * 1024;  // what a block of a Hopper GPU may have

struct Error {
  const char* what;
};

// Ends the launch, which answers with the message.
[[noreturn]] void fail(const char* what);
// The 32 lanes' collective: every lane brings `mine`, the last one has `all` computed and each takes its own result
// away.
void meet(const char* what, const void* mine, void* result, size_t size, void (*all)(const void*, void*));
void meet_block(int* vote);
void check_shared(const void* p, size_t alignment, const char* what);
void copy_later(void* shared, const void* global);
void commit_copies();
void wait_for_copies(int pending);
const char* run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

template <class T>
T together(const char* what, const T& mine, void (*all)(const T*, T*)) {
  static_assert(sizeof(T) <= kOperands);
  static thread_local void (*function)(const T*, T*);
  function = all;
  T result;
  meet(what, &mine, &result, sizeof(T),
       [](const void* in, void* out) { function(static_cast<const T*>(in), static_cast<T*>(out)); });
  return result;
}

struct Shuffled {
  float v;
  int from;
};

}  // namespace emulated

inline void __syncthreads() {
  int none = 0;
  emulated::meet_block(&none);
}

inline int __syncthreads_or(int vote) {
  emulated::meet_block(&vote);
  return vote;
}

inline void __syncwarp(unsigned = 0xffffffffu) {
  emulated::together<int>("__syncwarp", 0, [](const int*, int*) {});
}

inline float __shfl_sync(unsigned, float v, int from) {
  using emulated::Shuffled;
  return emulated::together<Shuffled>("__shfl_sync", {v, from},
                                      [](const Shuffled* in, Shuffled* out) {
                                        for (int lane = 0; lane < 32; lane++) out[lane].v = in[in[lane].from & 31].v;
                                      })
      .v;
}

inline float __shfl_xor_sync(unsigned mask, float v, int lanes) {
  return __shfl_sync(mask, v, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

inline int __any_sync(unsigned, int vote) {
  return emulated::together<int>("__any_sync", vote, [](const int* in, int* out) {
    int any = 0;
    for (int lane = 0; lane < 32; lane++) any |= in[lane] != 0;
    for (int lane = 0; lane < 32; lane++) out[lane] = any;
  });
}

inline float __fdividef(float a, float b) { return a / b; }

using cudaStream_t = void*;
using cudaError_t = const char*;
constexpr cudaError_t cudaSuccess = nullptr;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

namespace emulated {
// What the emulated device claims to be; tests change it.
inline int processors = 132, shared_per_block = kShared;
}  // namespace emulated

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulated::processors : emulated::shared_per_block;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulated::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
}
