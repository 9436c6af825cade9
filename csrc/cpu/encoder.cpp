#include "cpu/encoder.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "common/check.h"

#define FASTVIT_KERNELS "cpu/encoder_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "encoder";
constexpr int64_t kPerBlock = 14;

const float* optional_vector(const Tensor& t, int64_t n, const Tensor& x, const char* name) {
  return t.numel() == 0 ? nullptr : vector<float>(OptionalTensor(t), n, x, ScalarType::Float, kOp, name);
}

// parameters: for each block norm1's weight and bias; qkv's weight and bias; proj's and LayerScale; norm2's; fc1's;
// fc2's and LayerScale. Weights of linear layers come from pack_weight, the others are float32, empty where there are
// none.
Tensor encoder(const Tensor& x, std::vector<Tensor> parameters, std::vector<double> eps, int64_t heads, double scale,
               const std::string& activation) {
  FASTVIT_CHECK(x.dim() == 3 && x.is_contiguous(), kOp, ": x must have shape (B, N, D) and be contiguous");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  const int64_t depth = static_cast<int64_t>(parameters.size()) / kPerBlock;
  FASTVIT_CHECK(
      depth * kPerBlock == static_cast<int64_t>(parameters.size()) && 2 * depth == static_cast<int64_t>(eps.size()),
      kOp, ": a block has ", kPerBlock, " parameters and 2 eps");
  FASTVIT_CHECK(heads > 0 && width > 0 && width % heads == 0, kOp, ": D must be a multiple of the number of heads");
  Tensor y = empty(x, {batch, tokens, width});
  if (y.numel() == 0) return y;
  std::vector<BlockArgs> blocks(depth);
  int64_t hidden = 1;
  // Attention, and layers that are not int8.
  Compute compute = Compute::bfloat16;
  bool int8 = false, found = false;
  for (int64_t b = 0; b < depth; b++) {
    const Tensor* p = parameters.data() + b * kPerBlock;
    BlockArgs& block = blocks[b];
    block.norm1_weight = optional_vector(p[0], width, x, "norm1_weight");
    block.norm1_bias = optional_vector(p[1], width, x, "norm1_bias");
    block.qkv.weight = packed_weight(p[2], 3 * width, width, kOp, "qkv");
    block.qkv.bias = optional_vector(p[3], 3 * width, x, "qkv_bias");
    block.proj.weight = packed_weight(p[4], width, width, kOp, "proj");
    block.proj.bias = optional_vector(p[5], width, x, "proj_bias");
    block.proj.layer_scale = optional_vector(p[6], width, x, "layer_scale1");
    block.norm2_weight = optional_vector(p[7], width, x, "norm2_weight");
    block.norm2_bias = optional_vector(p[8], width, x, "norm2_bias");
    block.fc1.weight = packed_weight(p[9], -1, width, kOp, "fc1");
    block.fc1.bias = optional_vector(p[10], block.fc1.weight.n, x, "fc1_bias");
    block.fc2.weight = packed_weight(p[11], width, block.fc1.weight.n, kOp, "fc2");
    block.fc2.bias = optional_vector(p[12], width, x, "fc2_bias");
    block.fc2.layer_scale = optional_vector(p[13], width, x, "layer_scale2");
    block.norm1_eps = eps[2 * b];
    block.norm2_eps = eps[2 * b + 1];
    hidden = hidden > block.fc1.weight.n ? hidden : block.fc1.weight.n;
    for (const LinearArgs* linear : {&block.qkv, &block.proj, &block.fc1, &block.fc2}) {
      const Compute its = linear->weight.compute;
      int8 = int8 || its == Compute::int8;
      if (its == Compute::int8) continue;
      FASTVIT_CHECK(its != Compute::float64 && (its == compute || !found), kOp,
                    ": layers that are not int8 must all be packed for float32, or all for bfloat16");
      compute = its;
      found = true;
    }
  }
  const Activation parsed = parse_activation(activation, kOp);
  dispatch(x, kOp, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<T, double>) {
      FASTVIT_CHECK(false, kOp, ": float64 is not supported");
    } else {
      EncoderArgs args;
      args.blocks = blocks.data();
      args.depth = depth;
      args.batch = batch;
      args.tokens = tokens;
      args.width = width;
      args.heads = heads;
      args.hidden = hidden;
      args.scale = scale;
      args.activation = parsed;
      args.int8 = int8;
      args.x = x.const_data_ptr();
      args.y = y.mutable_data_ptr();
      if (compute == Compute::bfloat16)
        FASTVIT_SELECT(encode<T, bfloat16>)(args);
      else
        FASTVIT_SELECT(encode<T, float>)(args);
    }
  });
  return y;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) { m.impl("encoder", TORCH_BOX(&fastvit::encoder)); }
