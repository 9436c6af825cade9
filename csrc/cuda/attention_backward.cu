#include "cuda/attention_backward.cuh"

#include "cuda/attention_dispatch.cuh"

namespace fastvit::cuda {
namespace {

struct Backward {
  template <class Gradient>
  static const char* launch_pass(const Attention& g, int own, int other, void* stream) {
    if (own == 0) return nullptr;
    AttentionShape shape;
    shape.heads = int64_t{g.sequences} * g.heads;
    shape.own = own;
    shape.other = other;
    shape.row_bytes = Tile<Gradient::kHeadDim>::ROW_BYTES;
    shape.staged = Gradient::kStaged;
    shape.extra_bytes = Gradient::kReadsStatistics ? sizeof(float2) : 0;
    shape.registers = Gradient::kRegisters;
    shape.stays = true;
    return launch_plan(attention_backward_kernel<Gradient>, plan_on_device(shape), g, stream);
  }

  template <class T, int E, bool GENERAL>
  static const char* launch_passes(const Attention& g, void* stream) {
    const int queries = g.longest, keys = g.cu_seqlens ? g.longest : g.keys;
    // The first pass writes the delta that the second one reads.
    const char* error = launch_pass<QueryGradient<T, E, GENERAL>>(g, queries, keys, stream);
    return error ? error : launch_pass<KeyGradient<T, E, GENERAL>>(g, keys, queries, stream);
  }

  template <class T, int E>
  static const char* launch(const Attention& g, void* stream) {
    if (g.causal || g.mask_kind != MaskKind::none) return launch_passes<T, E, true>(g, stream);
    return launch_passes<T, E, false>(g, stream);
  }
};

}  // namespace

const char* launch_attention_backward(const Attention& args, Dtype dtype, void* stream) {
  return dispatch_heads<Backward>(args, dtype, stream);
}

}  // namespace fastvit::cuda
