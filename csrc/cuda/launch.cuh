#pragma once

// Launching kernels from the host.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/dtype.h"

namespace fastvit::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Blocks along x, and many more of them along y and z together.
struct Grid {
  unsigned x = 1, y = 1, z = 1;

  Grid(int64_t blocks) : x(static_cast<unsigned>(blocks)) {}
  Grid(int64_t blocks, int64_t rest) : x(static_cast<unsigned>(blocks)) {
    constexpr int64_t kMost = 0x8000;
    y = static_cast<unsigned>(rest < kMost ? rest : kMost);
    z = static_cast<unsigned>((rest + y - 1) / y);
  }
};

// Elements of 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Whether 16 bytes can be read at a time: of tensors, absent ones aside, that begin there and whose rows do.
template <class T>
bool is_aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  for (const int64_t stride : strides) bits |= static_cast<uintptr_t>(stride) * sizeof(T);
  return bits % 16 == 0;
}

// f(value of the type that holds the dtype).
template <class F>
const char* with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::float32) return f(float{});
  if (dtype == Dtype::float16) return f(__half{});
  return f(__nv_bfloat16{});
}

// Null or CUDA's message.
template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared, void* stream,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim.x = grid.x;
  config.gridDim.y = grid.y;
  config.gridDim.z = grid.z;
  config.blockDim.x = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  // More than the 48 KiB that every kernel may have must be asked for.
  if (shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastvit::cuda
