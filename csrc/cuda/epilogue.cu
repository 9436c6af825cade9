#include "cuda/epilogue.cuh"

namespace fastvit::cuda {
namespace {

template <int VEC, class Arguments>
const char* launch_rows(void (*kernel)(Arguments), const Arguments& g, void* stream) {
  return launch_kernel(kernel, row_tile_blocks<VEC>(g.rows, g.width), kRowWarps * 32, 0, stream, g);
}

}  // namespace

const char* launch_epilogue(const Epilogue& g, Dtype dtype, void* stream) {
  if (g.rows == 0 || g.width == 0) return nullptr;
  return with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int VEC = kVector<T>;
    if (is_aligned<T>({g.h, g.layer_scale, g.residual, g.y}, {g.residual_stride, g.width}))
      return launch_rows<VEC>(epilogue_kernel<T, VEC>, g, stream);
    return launch_rows<1>(epilogue_kernel<T, 1>, g, stream);
  });
}

const char* launch_activation_backward(const ActivationBackward& g, Dtype dtype, void* stream) {
  if (g.rows == 0 || g.width == 0) return nullptr;
  return with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int VEC = kVector<T>;
    if (is_aligned<T>({g.dy, g.preact, g.dpreact}, {g.dy_stride, g.width}))
      return launch_rows<VEC>(activation_backward_kernel<T, VEC>, g, stream);
    return launch_rows<1>(activation_backward_kernel<T, 1>, g, stream);
  });
}

}  // namespace fastvit::cuda
