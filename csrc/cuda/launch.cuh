#pragma once

// Launching kernels from the host.

#include <cuda_runtime.h>

#include <cstdint>

namespace fastvit::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Null or CUDA's message.
template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(blocks);
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
