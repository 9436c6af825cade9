#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/layer_norm.cuh"

namespace fastvit::cuda {
namespace {

template <class T, int VEC>
const char* launch_rows(const LayerNorm& g, void* stream) {
  // A warp holds up to 32 floats of a row per lane; wider rows would spill.
  constexpr int WARPS = 4, BLOCK_WARPS = 8;
  const int64_t blocks = std::min((g.rows + WARPS - 1) / WARPS, kMaxBlocks);
  if (g.width <= 512)
    return launch_kernel(layer_norm_warp_kernel<T, VEC, 512, WARPS>, blocks, WARPS * 32, 0, stream, g);
  if (g.width <= 1024)
    return launch_kernel(layer_norm_warp_kernel<T, VEC, 1024, WARPS>, blocks, WARPS * 32, 0, stream, g);
  return launch_kernel(layer_norm_block_kernel<T, VEC, BLOCK_WARPS>, std::min(g.rows, kMaxBlocks), BLOCK_WARPS * 32,
                       BLOCK_WARPS * sizeof(float), stream, g);
}

template <class T>
const char* launch_dtype(const LayerNorm& g, void* stream) {
  constexpr int VEC = 16 / sizeof(T);
  uintptr_t bits = 0;
  for (const void* p :
       {g.x, g.residual, g.layer_scale, g.weight, g.bias, const_cast<const void*>(g.y), const_cast<const void*>(g.z)})
    bits |= reinterpret_cast<uintptr_t>(p);
  const bool aligned = bits % 16 == 0 && (g.x_stride | g.residual_stride | g.width) % VEC == 0;
  return aligned ? launch_rows<T, VEC>(g, stream) : launch_rows<T, 1>(g, stream);
}

}  // namespace

const char* launch_layer_norm(const LayerNorm& args, Dtype dtype, void* stream) {
  if (args.rows == 0 || args.width == 0) return nullptr;
  if (dtype == Dtype::float32) return launch_dtype<float>(args, stream);
  if (dtype == Dtype::float16) return launch_dtype<__half>(args, stream);
  return launch_dtype<__nv_bfloat16>(args, stream);
}

}  // namespace fastvit::cuda
