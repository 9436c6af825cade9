#include <algorithm>

#include "cuda/layer_norm.cuh"

namespace fastvit::cuda {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;

template <class T, int VEC>
void launch_rows(const LayerNorm& g, cudaStream_t stream) {
  // A warp holds up to 32 floats of a row per lane; wider rows would spill.
  constexpr int WARPS = 4, BLOCK_WARPS = 8;
  const auto blocks = static_cast<unsigned>(std::min((g.rows + WARPS - 1) / WARPS, kMaxBlocks));
  if (g.width <= 512) {
    layer_norm_warp_kernel<T, VEC, 512, WARPS><<<blocks, WARPS * 32, 0, stream>>>(g);
  } else if (g.width <= 1024) {
    layer_norm_warp_kernel<T, VEC, 1024, WARPS><<<blocks, WARPS * 32, 0, stream>>>(g);
  } else {
    const auto rows = static_cast<unsigned>(std::min(g.rows, kMaxBlocks));
    layer_norm_block_kernel<T, VEC, BLOCK_WARPS><<<rows, BLOCK_WARPS * 32, 0, stream>>>(g);
  }
}

template <class T>
void launch_dtype(const LayerNorm& g, cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T);
  uintptr_t bits = 0;
  for (const void* p :
       {g.x, g.residual, g.layer_scale, g.weight, g.bias, const_cast<const void*>(g.y), const_cast<const void*>(g.z)})
    bits |= reinterpret_cast<uintptr_t>(p);
  const bool aligned = bits % 16 == 0 && (g.x_stride | g.residual_stride | g.width) % VEC == 0;
  aligned ? launch_rows<T, VEC>(g, stream) : launch_rows<T, 1>(g, stream);
}

}  // namespace

const char* launch(const LayerNorm& args, Dtype dtype, void* stream) {
  if (args.rows == 0 || args.width == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == Dtype::float32) launch_dtype<float>(args, s);
  if (dtype == Dtype::float16) launch_dtype<__half>(args, s);
  if (dtype == Dtype::bfloat16) launch_dtype<__nv_bfloat16>(args, s);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastvit::cuda
