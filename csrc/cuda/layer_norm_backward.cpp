#include "cuda/layer_norm_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/tensors.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "layer_norm_backward";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    const Tensor& dy, const OptionalTensor& dz, const Tensor& z, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& x, const OptionalTensor& layer_scale,
    const OptionalTensor& sample_scale) {
  FASTVIT_CHECK(z.dim() == 2, kOp, ": z must have shape (M, D)");
  FASTVIT_CHECK(!layer_scale || x, kOp, ": layer_scale needs x");
  const cuda::Dtype dtype = cuda::dtype_of(z, kOp, "z");
  const cuda::Stream stream(z, kOp);
  const int64_t m = z.size(0), width = z.size(1);
  const bool scaled = layer_scale.has_value();
  Tensor d = empty(z, {m, width});
  Tensor dx = scaled || sample_scale ? empty(z, {m, width}) : empty(z, {0});
  Tensor dlayer_scale = scaled ? empty(z, {width}) : empty(z, {0});
  Tensor dweight = empty(z, {width}), dbias = empty(z, {width});
  const Rows<void> dy_rows = rows<void>(dy, m, width, z, kOp, "dy");
  const Rows<void> dz_rows = rows<void>(dz, m, width, z, kOp, "dz");
  const Rows<void> z_rows = rows<void>(z, m, width, z, kOp, "z");
  const Rows<void> x_rows = scaled ? rows<void>(x, m, width, z, kOp, "x") : Rows<void>{};
  cuda::LayerNormBackward args;
  args.dy = dy_rows.data;
  args.dy_stride = dy_rows.stride;
  args.dz = dz_rows.data;
  args.dz_stride = dz_rows.stride;
  args.z = z_rows.data;
  args.z_stride = z_rows.stride;
  args.x = x_rows.data;
  args.x_stride = x_rows.stride;
  args.weight = vector<void>(weight, width, z, kOp, "weight");
  args.layer_scale = vector<void>(layer_scale, width, z, kOp, "layer_scale");
  cuda::set_sample_scale(args, sample_scale, m, z, kOp);
  args.mean = vector<float>(OptionalTensor(mean), m, z, ScalarType::Float, kOp, "mean");
  args.rstd = vector<float>(OptionalTensor(rstd), m, z, ScalarType::Float, kOp, "rstd");
  args.d = d.mutable_data_ptr();
  args.dx = scaled || sample_scale ? dx.mutable_data_ptr() : nullptr;
  args.dweight = dweight.mutable_data_ptr();
  args.dbias = dbias.mutable_data_ptr();
  args.dlayer_scale = dlayer_scale.mutable_data_ptr();
  args.rows = m;
  args.width = width;
  args.blocks = cuda::layer_norm_backward_blocks(args, dtype);
  const Tensor partial = empty(z, {args.blocks, scaled ? 3 : 2, width}, ScalarType::Float);
  args.partial = data<float>(partial);
  stream.check(cuda::launch_layer_norm_backward(args, dtype, stream));
  return {d, dx, dlayer_scale, dweight, dbias};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("layer_norm_backward", TORCH_BOX(&fastvit::layer_norm_backward_cuda));
}
