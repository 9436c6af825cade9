// The CUDA LayerNorm kernels on CPU threads, for tests/test_cuda_compile.py: float only, called through ctypes.
#include "cuda_on_threads.h"

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half) { return 0; }
inline float __bfloat162float(__nv_bfloat16) { return 0; }
inline __half __float2half_rn(float) { return {}; }
inline __nv_bfloat16 __float2bfloat16_rn(float) { return {}; }

#include "cuda/layer_norm.cuh"

using namespace fastvit::cuda;

template <int VEC>
void launch_kind(const LayerNorm& g, int blocks) {
  if (g.width <= 512)
    launch_on_threads(blocks, 128, [&] { layer_norm_warp_kernel<float, VEC, 512, 4>(g); });
  else if (g.width <= 1024)
    launch_on_threads(blocks, 128, [&] { layer_norm_warp_kernel<float, VEC, 1024, 4>(g); });
  else
    launch_on_threads(blocks, 256, [&] { layer_norm_block_kernel<float, VEC, 8>(g); });
}

extern "C" void layer_norm(const float* x, int64_t x_stride, const float* residual, int64_t residual_stride,
                           const float* layer_scale, const float* weight, const float* bias, float* y, float* z,
                           float* mean, float* rstd, int64_t rows, int64_t width, float eps, int blocks, int vec) {
  const LayerNorm g{x,    residual, layer_scale, weight,          bias, y,     z,
                    mean, rstd,     x_stride,    residual_stride, rows, width, eps};
  vec == 4 ? launch_kind<4>(g, blocks) : launch_kind<1>(g, blocks);
}
