#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/launch.cuh"

namespace fastvit::cuda {

inline AttentionPlan plan_on_device(const AttentionShape& shape) {
  return plan_attention(shape, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                        device_attribute(cudaDevAttrMultiProcessorCount));
}

template <class Kernel>
const char* launch_plan(Kernel kernel, const AttentionPlan& plan, const Attention& g, void* stream) {
  return launch_kernel(kernel, {plan.row_blocks, plan.groups}, 32 * plan.warps, plan.shared, stream, g, plan);
}

// One head dim compiles in a tenth of the time of all: what checks of every architecture ask for.
#ifndef FASTVIT_HEAD_DIM
#define FASTVIT_HEAD_DIM 0
#endif

template <class Launch, class T, int E = 32>
const char* dispatch_head_dim(const Attention& g, void* stream) {
  if constexpr (FASTVIT_HEAD_DIM == 0 || FASTVIT_HEAD_DIM == E)
    if (g.head_dim <= E) return Launch::template launch<T, E>(g, stream);
  if constexpr (E < kMaxHeadDim) return dispatch_head_dim<Launch, T, E + 16>(g, stream);
  return "attention has no kernel for heads as wide";
}

template <class Launch>
const char* dispatch_heads(const Attention& g, Dtype dtype, void* stream) {
  if (g.sequences == 0 || g.heads == 0) return nullptr;
  if (dtype == Dtype::float16) return dispatch_head_dim<Launch, __half>(g, stream);
  return dispatch_head_dim<Launch, __nv_bfloat16>(g, stream);
}

}  // namespace fastvit::cuda
