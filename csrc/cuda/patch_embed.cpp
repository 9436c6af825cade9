#include "cuda/patch_embed.h"

#include <torch/csrc/stable/library.h>

#include <limits>

#include "cuda/product.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "patch_embed";

Tensor shaped(const Tensor& t, std::initializer_list<int64_t> size) {
  return torch::stable::view(t, {size.begin(), size.size()});
}

// Factors are read here, on the host, so that nothing is copied to the device.
void read_factors(float* out, const Tensor& factors, int64_t channels, const char* name) {
  FASTVIT_CHECK(channels <= cuda::kMaxChannels, kOp, ": images of at most ", cuda::kMaxChannels,
                " channels are normalised, got ", channels);
  FASTVIT_CHECK(factors.device().type() == torch::headeronly::DeviceType::CPU, kOp, ": ", name, " must be on the CPU");
  const auto* values = vector<float>(factors, channels, factors, ScalarType::Float, kOp, name);
  for (int64_t c = 0; c < channels; c++) out[c] = values[c];
}

cuda::Patches patches_of(const Tensor& image, const Tensor& weight, const OptionalTensor& pixel_scale,
                         const OptionalTensor& pixel_shift) {
  FASTVIT_CHECK(image.dim() == 4 && weight.dim() == 4, kOp,
                ": image must have shape (B, C, height, width) and weight (D, C, P, Q)");
  const int64_t channels = image.size(1), patch_height = weight.size(2), patch_width = weight.size(3);
  cuda::Patches args;
  args.bytes = image.scalar_type() == ScalarType::Byte;
  args.normalised = pixel_scale.has_value();
  FASTVIT_CHECK(weight.size(1) == channels && patch_height > 0 && patch_width > 0 &&
                    image.size(2) % patch_height == 0 && image.size(3) % patch_width == 0,
                kOp, ": the image must have the weight's channels and whole patches");
  FASTVIT_CHECK(weight.is_contiguous() && image.device() == weight.device(), kOp,
                ": weight must be contiguous and on the image's device");
  FASTVIT_CHECK(args.bytes || image.scalar_type() == weight.scalar_type(), kOp,
                ": image must be uint8 or of weight's dtype");
  FASTVIT_CHECK(pixel_scale.has_value() == pixel_shift.has_value() && (pixel_scale || !args.bytes), kOp,
                ": pixel_scale and pixel_shift come together, and always with a uint8 image");
  constexpr int64_t kInt = std::numeric_limits<int>::max() / 2;
  FASTVIT_CHECK(image.size(2) < kInt && channels < kInt && image.size(3) < kInt / std::max<int64_t>(channels, 1) &&
                    patch_height * patch_width < kInt,
                kOp, ": the image is too wide or too high");
  args.image = image.const_data_ptr();
  for (int i = 0; i < 4; i++) args.strides[i] = image.stride(i);
  args.batch = image.size(0);
  args.channels = static_cast<int>(channels);
  args.height = static_cast<int>(image.size(2));
  args.width = static_cast<int>(image.size(3));
  args.patch_height = static_cast<int>(patch_height);
  args.patch_width = static_cast<int>(patch_width);
  if (pixel_scale) read_factors(args.scale, *pixel_scale, channels, "pixel_scale");
  if (pixel_shift) read_factors(args.shift, *pixel_shift, channels, "pixel_shift");
  return args;
}

Tensor patch_embed_cuda(const Tensor& image, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& pos_embed, const OptionalTensor& prefix,
                        const OptionalTensor& pixel_scale, const OptionalTensor& pixel_shift,
                        const OptionalTensor& packed) {
  FASTVIT_CHECK(!packed, kOp, ": packed weights are for the CPU kernels");
  const cuda::Dtype dtype = cuda::dtype_of(weight, kOp, "weight");
  cuda::Patches patches = patches_of(image, weight, pixel_scale, pixel_shift);
  const int64_t batch = patches.batch, width = weight.size(0);
  const int64_t count = int64_t{patches.height / patches.patch_height} * (patches.width / patches.patch_width);
  const int64_t depth = int64_t{patches.channels} * patches.patch_height * patches.patch_width;
  const int64_t prefixes = prefix ? prefix->size(0) : 0, tokens = prefixes + count;
  const int64_t positions = pos_embed ? pos_embed->size(0) : 0;
  FASTVIT_CHECK(!pos_embed || positions == tokens || positions == count, kOp,
                ": pos_embed must have a row per token or per patch");
  const cuda::Stream stream(weight, kOp);
  Tensor matrix = empty(weight, {batch * count, depth});
  patches.patches = matrix.mutable_data_ptr();
  stream.check(cuda::launch_patches(patches, dtype, stream));
  const Tensor products = cuda::product(matrix, shaped(weight, {width, depth}), bias);
  if (!prefix && !pos_embed) return shaped(products, {batch, count, width});
  Tensor y = empty(weight, {batch, tokens, width});
  const Rows<char> position_rows = rows<char>(pos_embed, positions, width, weight, kOp, "pos_embed");
  const Rows<void> prefix_rows = rows<void>(prefix, prefixes, width, weight, kOp, "prefix");
  cuda::PatchTokens args;
  args.products = products.const_data_ptr();
  args.prefix = prefix_rows.data;
  args.prefix_stride = prefix_rows.stride;
  args.positions = position_rows.data;
  args.positions_stride = position_rows.stride;
  if (pos_embed && positions == tokens) {
    args.prefix_positions = position_rows.data;
    args.positions = position_rows.data + prefixes * position_rows.stride * weight.element_size();
  }
  args.y = y.mutable_data_ptr();
  args.batch = batch;
  args.prefixes = prefixes;
  args.tokens = tokens;
  args.width = width;
  stream.check(cuda::launch_patch_tokens(args, dtype, stream));
  return y;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("patch_embed", TORCH_BOX(&fastvit::patch_embed_cuda));
}
