#include "cuda/layer_norm_backward.cuh"

#include <algorithm>

#include "cuda/launch.cuh"

namespace fastvit::cuda {
namespace {

struct Plan {
  void (*kernel)(LayerNormBackward);
  int64_t blocks;
  int threads;
  size_t shared;
  bool sums_in_shared;
};

int64_t blocks_for(int64_t wanted, int per_processor) {
  return std::min<int64_t>(wanted, int64_t{per_processor} * device_attribute(cudaDevAttrMultiProcessorCount));
}

// Registers that a lane needs, more or less: for sums over rows, four rows, its place in them and the layer scale.
template <class T, int VEC, int MAX_WIDTH, bool SCALED>
constexpr int kRegisters = (SCALED ? 3 : 2) * MAX_WIDTH / 32 + MAX_WIDTH / 8 * (VEC > 1 ? int{sizeof(T)} : 4) / 4 +
                           MAX_WIDTH / 32 / VEC + (SCALED ? 8 : 0);

template <class T, int VEC, int MAX_WIDTH, bool SCALED>
Plan plan_warps(const LayerNormBackward& g) {
  constexpr int REGISTERS = kRegisters<T, VEC, MAX_WIDTH, SCALED>;
  // As many as fit twice on a multiprocessor without spilling: they have 128, 168 or 255 registers.
  constexpr int WARPS = REGISTERS < 100 ? 8 : REGISTERS < 136 ? 6 : 4;
  return {layer_norm_backward_warp_kernel<T, VEC, MAX_WIDTH, SCALED, WARPS>,
          blocks_for((g.rows + WARPS - 1) / WARPS, 2), WARPS * 32, WARPS * MAX_WIDTH * sizeof(float), true};
}

template <class T, int VEC, bool SCALED>
Plan plan_rows(const LayerNormBackward& g) {
  if (g.width <= 512) return plan_warps<T, VEC, 512, SCALED>(g);
  // Rows that begin anywhere are slow at any width: fewer kernels will do.
  if constexpr (VEC > 1)
    if (g.width <= 768) return plan_warps<T, VEC, 768, SCALED>(g);
  if constexpr (VEC > 1 && kRegisters<T, VEC, 1024, SCALED> < 210)
    if (g.width <= 1024) return plan_warps<T, VEC, 1024, SCALED>(g);
  const int64_t warps = std::min<int64_t>(8, (g.width + 32 * VEC - 1) / (32 * VEC));
  const int64_t sums = (SCALED ? 3 : 2) * g.width * static_cast<int64_t>(sizeof(float));
  const int64_t shared = warps * 2 * static_cast<int64_t>(sizeof(float));
  const bool fits = shared + sums <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return {layer_norm_backward_block_kernel<T, VEC, SCALED>, blocks_for(g.rows, 4), static_cast<int>(warps * 32),
          static_cast<size_t>(fits ? shared + sums : shared), fits};
}

template <class T, int VEC>
Plan plan_aligned(const LayerNormBackward& g) {
  return g.layer_scale ? plan_rows<T, VEC, true>(g) : plan_rows<T, VEC, false>(g);
}

template <class T>
Plan plan(const LayerNormBackward& g) {
  const bool aligned = is_aligned<T>({g.dy, g.dz, g.z, g.x, g.weight, g.layer_scale, g.d, g.dx},
                                     {g.dy_stride, g.dz_stride, g.z_stride, g.x_stride, g.width});
  return aligned ? plan_aligned<T, kVector<T>>(g) : plan_aligned<T, 1>(g);
}

template <class T>
const char* launch_dtype(LayerNormBackward g, void* stream) {
  const Plan first = plan<T>(g);
  g.sums_in_shared = first.sums_in_shared;
  if (g.rows) {
    const char* error = launch_kernel(first.kernel, g.blocks, first.threads, first.shared, stream, g);
    if (error) return error;
  }
  constexpr int WARPS = 16;
  const int64_t columns = (g.layer_scale ? 3 : 2) * g.width;
  return launch_kernel(layer_norm_backward_sum_kernel<T, WARPS>, std::min((columns + 31) / 32, kMaxBlocks), WARPS * 32,
                       WARPS * 32 * sizeof(float), stream, g);
}

}  // namespace

int layer_norm_backward_blocks(const LayerNormBackward& args, Dtype dtype) {
  int64_t blocks = 0;
  with_type(dtype, [&](auto type) -> const char* {
    blocks = plan<decltype(type)>(args).blocks;
    return nullptr;
  });
  return static_cast<int>(blocks);
}

const char* launch_layer_norm_backward(const LayerNormBackward& args, Dtype dtype, void* stream) {
  if (args.width == 0) return nullptr;
  return with_type(dtype, [&](auto type) { return launch_dtype<decltype(type)>(args, stream); });
}

}  // namespace fastvit::cuda
