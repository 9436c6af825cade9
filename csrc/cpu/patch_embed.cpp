#include "cpu/patch_embed.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/check.h"
#include "cpu/kernels.h"
#include "cpu/packed.h"

#define FASTVIT_KERNELS "cpu/patch_embed_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "patch_embed";

// Patches copied and multiplied at a time, in whole images.
constexpr int64_t kBlockRows = 1600;

template <class T>
void embed_images(PatchArgs<T> patches, GemmArgs<T> product, int64_t batch, int64_t tokens) {
  const int64_t per_image = patches.rows * patches.columns;
  const int64_t block = std::max<int64_t>(1, std::min(batch, kBlockRows / std::max<int64_t>(per_image, 1)));
  const Scratch scratch(block * per_image * product.k * sizeof(T));
  const auto gather = FASTVIT_SELECT(gather_patches<T>);
  for (int64_t image = 0; image < batch; image += block) {
    const int64_t first = image * per_image;
    product.m = std::min(block, batch - image) * per_image;
    parallel_for(product.m, 16384 / (product.k + 1) + 1, [&](int64_t begin, int64_t end) {
      PatchArgs<T> part = patches;
      part.patches = scratch.as<T>() + begin * product.k;
      gather(part, first + begin, first + end);
    });
    product.x = scratch.as<T>();
    product.x_stride = product.k;
    gemm(product);
    product.y += block * tokens * product.n;
  }
}

Tensor patch_embed(const Tensor& image, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& pos_embed, const OptionalTensor& prefix, const OptionalTensor& pixel_scale,
                   const OptionalTensor& pixel_shift, const OptionalTensor& packed) {
  FASTVIT_CHECK(image.dim() == 4 && weight.dim() == 4, kOp,
                ": image must have shape (B, C, height, width) and weight (D, C, P, Q)");
  const int64_t batch = image.size(0), channels = image.size(1), width = weight.size(0);
  const int64_t patch_height = weight.size(2), patch_width = weight.size(3);
  const bool bytes = image.scalar_type() == ScalarType::Byte;
  FASTVIT_CHECK(weight.size(1) == channels && patch_height > 0 && patch_width > 0 &&
                    image.size(2) % patch_height == 0 && image.size(3) % patch_width == 0,
                kOp, ": the image must have the weight's channels and whole patches");
  FASTVIT_CHECK(weight.is_contiguous() && image.device() == weight.device(), kOp,
                ": weight must be contiguous and on the image's device");
  FASTVIT_CHECK(bytes || image.scalar_type() == weight.scalar_type(), kOp,
                ": image must be uint8 or of weight's dtype");
  FASTVIT_CHECK(pixel_scale.has_value() == pixel_shift.has_value() && (pixel_scale || !bytes), kOp,
                ": pixel_scale and pixel_shift come together, and always with a uint8 image");
  const int64_t grid_rows = image.size(2) / patch_height, grid_columns = image.size(3) / patch_width;
  const int64_t count = grid_rows * grid_columns, prefixes = prefix ? prefix->size(0) : 0, tokens = prefixes + count;
  const int64_t positions = pos_embed ? pos_embed->size(0) : 0;
  FASTVIT_CHECK(!pos_embed || positions == tokens || positions == count, kOp,
                ": pos_embed must have a row per token or per patch");
  Tensor y = empty(weight, {batch, tokens, width});
  dispatch(weight, kOp, [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> position_rows = rows<T>(pos_embed, positions, width, weight, kOp, "pos_embed");
    const Rows<T> prefix_rows = rows<T>(prefix, prefixes, width, weight, kOp, "prefix");
    const bool every_token = positions == tokens;
    PatchArgs<T> patches;
    patches.image = image.const_data_ptr();
    patches.bytes = bytes;
    for (int i = 0; i < 4; i++) patches.strides[i] = image.stride(i);
    patches.channels = channels;
    patches.patch_height = patch_height;
    patches.patch_width = patch_width;
    patches.rows = grid_rows;
    patches.columns = grid_columns;
    patches.scale = vector<float>(pixel_scale, channels, weight, ScalarType::Float, kOp, "pixel_scale");
    patches.shift = vector<float>(pixel_shift, channels, weight, ScalarType::Float, kOp, "pixel_shift");
    GemmArgs<T> product;
    product.weight = static_cast<const T*>(weight.const_data_ptr());
    product.weight_stride = product.k = channels * patch_height * patch_width;
    product.panels = panels_of<T>(packed, width, product.k, kOp, "packed");
    product.n = width;
    product.bias = vector<T>(bias, width, weight, kOp, "bias");
    product.residual = pos_embed ? position_rows[every_token ? prefixes : 0] : nullptr;
    product.residual_stride = position_rows.stride;
    product.residual_period = product.group = std::max<int64_t>(count, 1);
    product.gap = prefixes;
    product.y = data<T>(y);
    product.y_stride = width;
    embed_images(patches, product, batch, tokens);
    PrefixArgs<T> prefix_args;
    prefix_args.prefix = prefix_rows.data;
    prefix_args.prefix_stride = prefix_rows.stride;
    prefix_args.positions = every_token ? position_rows.data : nullptr;
    prefix_args.positions_stride = position_rows.stride;
    prefix_args.batch = batch;
    prefix_args.count = prefixes;
    prefix_args.tokens = tokens;
    prefix_args.width = width;
    prefix_args.y = data<T>(y);
    FASTVIT_SELECT(prefix_tokens<T>)(prefix_args);
  });
  return y;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("patch_embed", TORCH_BOX(&fastvit::patch_embed)); }
