#include "cuda/layer_norm.cuh"

#include <algorithm>

#include "cuda/launch.cuh"

namespace fastvit::cuda {
namespace {

template <class T, int VEC, int MAX_WIDTH>
const char* launch_warps(const LayerNorm& g, void* stream) {
  constexpr int WARPS = 4;
  const int64_t blocks = std::min((g.rows + WARPS - 1) / WARPS, kMaxBlocks);
  return launch_kernel(layer_norm_warp_kernel<T, VEC, MAX_WIDTH, WARPS>, blocks, WARPS * 32, 0, stream, g);
}

template <class T, int VEC>
const char* launch_rows(const LayerNorm& g, void* stream) {
  // Rows that begin anywhere are slow at any width: fewer kernels will do.
  if constexpr (VEC > 1) {
    if (g.width <= 512) return launch_warps<T, VEC, 512>(g, stream);
    if (g.width <= 768) return launch_warps<T, VEC, 768>(g, stream);
    if (g.width > 1024 && g.width <= 1536) return launch_warps<T, VEC, 1536>(g, stream);
  }
  if (g.width <= 1024) return launch_warps<T, VEC, 1024>(g, stream);
  constexpr int WARPS = 8;
  return launch_kernel(layer_norm_block_kernel<T, VEC, WARPS>, std::min(g.rows, kMaxBlocks), WARPS * 32,
                       2 * WARPS * sizeof(float), stream, g);
}

template <class T>
const char* launch_dtype(const LayerNorm& g, void* stream) {
  constexpr int VEC = 16 / sizeof(T);
  const bool aligned = all_aligned({g.x, g.residual, g.layer_scale, g.weight, g.bias, g.y, g.z}) &&
                       (g.x_stride | g.residual_stride | g.width) % VEC == 0;
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
