#include "cuda/patch_embed.cuh"

namespace fastvit::cuda {
namespace {

template <class T, class Pixel, int VEC>
const char* launch_pixels(Patches g, void* stream) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(g.image);
  for (int i = 0; i < 3; i++) bits |= static_cast<uintptr_t>(g.strides[i]) * sizeof(Pixel);
  g.vectors = g.strides[3] == 1 && bits % (VEC * sizeof(Pixel)) == 0;
  const int64_t units = int64_t{g.channels} * (g.width / VEC);
  const int threads = static_cast<int>(std::min<int64_t>((units + 31) / 32 * 32, 256));
  return launch_kernel(patches_kernel<T, Pixel, VEC>, std::min(g.batch * g.height, kMaxBlocks), threads, 0, stream, g);
}

template <class T, class Pixel>
const char* launch_vectors(const Patches& g, void* stream) {
  constexpr int VEC = kVector<T>;
  if (g.patch_width % VEC == 0) return launch_pixels<T, Pixel, VEC>(g, stream);
  if (g.patch_width % 2 == 0) return launch_pixels<T, Pixel, 2>(g, stream);
  return launch_pixels<T, Pixel, 1>(g, stream);
}

template <class T, int VEC>
const char* launch_tokens(const PatchTokens& g, void* stream) {
  const int64_t column_tiles = (g.width + 32 * VEC - 1) / (32 * VEC);
  const int64_t token_blocks = (g.tokens + kRowWarps - 1) / kRowWarps * column_tiles;
  if (token_blocks > kMaxBlocks) return "patch_embed needs more blocks than a grid has";
  const int64_t images = std::min(g.batch, std::max<int64_t>(enough_blocks() / token_blocks, 1));
  return launch_kernel(patch_tokens_kernel<T, VEC>, token_blocks * images, kRowWarps * 32, 0, stream, g,
                       static_cast<unsigned>(token_blocks));
}

}  // namespace

const char* launch_patches(const Patches& g, Dtype dtype, void* stream) {
  if (g.batch == 0 || g.channels == 0 || g.height == 0 || g.width == 0) return nullptr;
  return with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    return g.bytes ? launch_vectors<T, uint8_t>(g, stream) : launch_vectors<T, T>(g, stream);
  });
}

const char* launch_patch_tokens(const PatchTokens& g, Dtype dtype, void* stream) {
  if (g.batch == 0 || g.tokens == 0 || g.width == 0) return nullptr;
  return with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (is_aligned<T>({g.products, g.prefix, g.positions, g.prefix_positions, g.y},
                      {g.prefix_stride, g.positions_stride, g.width}))
      return launch_tokens<T, kVector<T>>(g, stream);
    return launch_tokens<T, 1>(g, stream);
  });
}

}  // namespace fastvit::cuda
