#include "cuda/layer_norm.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/check.h"

// Weak, so that this object also loads beside a torch without CUDA. The stable ABI of torch 2.10 has no other word for
// the native stream.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastvit {
namespace {

constexpr const char* kOp = "layer_norm";

cuda::Dtype cuda_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return cuda::Dtype::float32;
    case ScalarType::Half:
      return cuda::Dtype::float16;
    case ScalarType::BFloat16:
      return cuda::Dtype::bfloat16;
    default:
      FASTVIT_CHECK(false, kOp, ": on CUDA x must be float32, float16 or bfloat16, got ",
                    torch::headeronly::toString(t.scalar_type()));
      return cuda::Dtype::float32;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, const OptionalTensor& residual,
                                                           const OptionalTensor& layer_scale,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps) {
  FASTVIT_CHECK(x.dim() == 2, kOp, ": x must have shape (M, D)");
  FASTVIT_CHECK(residual || !layer_scale, kOp, ": layer_scale needs a residual");
  FASTVIT_CHECK(aoti_torch_get_current_cuda_stream, kOp, ": this torch was built without CUDA");
  const cuda::Dtype dtype = cuda_dtype(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t m = x.size(0), width = x.size(1);
  Tensor y = empty(x, {m, width});
  Tensor z = residual ? empty(x, {m, width}) : empty(x, {0});
  Tensor mean = empty(x, {m}, ScalarType::Float);
  Tensor rstd = empty(x, {m}, ScalarType::Float);
  const Rows<void> x_rows = rows<void>(x, m, width, x, kOp, "x");
  const Rows<void> residual_rows = rows<void>(residual, m, width, x, kOp, "residual");
  cuda::LayerNorm args;
  args.x = x_rows.data;
  args.x_stride = x_rows.stride;
  args.residual = residual_rows.data;
  args.residual_stride = residual_rows.stride;
  args.layer_scale = vector<void>(layer_scale, width, x, kOp, "layer_scale");
  args.weight = vector<void>(weight, width, x, kOp, "weight");
  args.bias = vector<void>(bias, width, x, kOp, "bias");
  args.y = y.mutable_data_ptr();
  args.z = z.mutable_data_ptr();
  args.mean = data<float>(mean);
  args.rstd = data<float>(rstd);
  args.rows = m;
  args.width = width;
  args.eps = static_cast<float>(eps);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* error = cuda::launch(args, dtype, stream);
  FASTVIT_CHECK(error == nullptr, kOp, ": CUDA launch failed: ", error ? error : "");
  return {y, z, mean, rstd};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CUDA, m) { m.impl("layer_norm", TORCH_BOX(&fastvit::layer_norm_cuda)); }
