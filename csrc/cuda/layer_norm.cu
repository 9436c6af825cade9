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

}  // namespace

const char* launch_layer_norm(const LayerNorm& args, Dtype dtype, void* stream) {
  if (args.rows == 0 || args.width == 0) return nullptr;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const bool aligned =
        is_aligned<T>({args.x, args.residual, args.layer_scale, args.weight, args.bias, args.y, args.z},
                      {args.x_stride, args.residual_stride, args.width});
    return aligned ? launch_rows<T, kVector<T>>(args, stream) : launch_rows<T, 1>(args, stream);
  });
}

}  // namespace fastvit::cuda
