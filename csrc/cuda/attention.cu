#include "cuda/attention.cuh"

#include "cuda/attention_dispatch.cuh"

namespace fastvit::cuda {
namespace {

struct Forward {
  template <class T, int E>
  static const char* launch(const Attention& g, void* stream) {
    // Two times 16 rows share what is read of keys and values; wider heads leave no registers for them.
    constexpr int kRows = E <= 64 ? 32 : 16;
    AttentionShape shape;
    shape.heads = int64_t{g.sequences} * g.heads;
    shape.own = g.longest;
    shape.other = g.cu_seqlens ? g.longest : g.keys;
    shape.row_bytes = Tile<E>::ROW_BYTES;
    // A scale that turns the order of scores round needs them one by one, too.
    if (g.causal || g.mask_kind != MaskKind::none || !(g.scale > 0)) {
      shape.rows = shape.staged = 16;
      return launch_plan(attention_streaming_kernel<T, E, 1, true>, plan_on_device(shape), g, stream);
    }
    shape.rows = shape.staged = kRows;
    shape.registers = kOneCopyRegisters<E>;
    shape.stays = true;
    const AttentionPlan plan = plan_on_device(shape);
    if (plan.streams) return launch_plan(attention_streaming_kernel<T, E, kRows / 16, false>, plan, g, stream);
    return launch_plan(attention_kernel<T, E, kRows / 16>, plan, g, stream);
  }
};

}  // namespace

const char* launch_attention(const Attention& args, Dtype dtype, void* stream) {
  return args.longest ? dispatch_heads<Forward>(args, dtype, stream) : nullptr;
}

}  // namespace fastvit::cuda
