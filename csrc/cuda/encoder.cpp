#include <torch/csrc/stable/library.h>

#include <limits>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/layer_norm.h"
#include "cuda/product.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "encoder";
constexpr size_t kPerBlock = 14;

OptionalTensor optional(const Tensor& t) { return t.numel() == 0 ? std::nullopt : OptionalTensor(t); }

// x Wᵀ + b, of so many columns.
Tensor projected(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t columns, const char* name) {
  FASTVIT_CHECK(weight.dim() == 2 && weight.size(0) == columns, kOp, ": ", name, " must have ", columns, " rows");
  check_like(weight, x, x.scalar_type(), kOp, name);
  return cuda::product(x, weight, optional(bias));
}

// The tokens of a call, and where its kernels go.
struct Pass {
  int64_t batch, tokens, width;
  int heads;
  float scale;
  cuda::Dtype dtype;
  const cuda::Stream& stream;

  int64_t rows() const { return batch * tokens; }

  // LN(z) after z += layer_scale * branch, if there is a branch: in z's own memory but for the first time.
  Tensor normalised(Tensor& z, const Tensor* branch, const OptionalTensor& layer_scale, bool in_place,
                    const Tensor& weight, const Tensor& bias, double eps) const {
    cuda::LayerNorm args;
    Tensor y = empty(z, {rows(), width});
    args.x = branch ? branch->const_data_ptr() : z.const_data_ptr();
    args.x_stride = args.residual_stride = width;
    if (branch) {
      args.residual = z.const_data_ptr();
      args.layer_scale = vector<void>(layer_scale, width, z, kOp, "layer_scale");
      if (!in_place) z = empty(y, {rows(), width});
      args.z = z.mutable_data_ptr();
    }
    args.weight = vector<void>(optional(weight), width, y, kOp, "norm_weight");
    args.bias = vector<void>(optional(bias), width, y, kOp, "norm_bias");
    args.y = y.mutable_data_ptr();
    args.rows = rows();
    args.width = width;
    args.eps = static_cast<float>(eps);
    stream.check(cuda::launch_layer_norm(args, dtype, stream));
    return y;
  }

  // Of the packed rows of a qkv projection.
  Tensor attended(const Tensor& qkv) const {
    Tensor out = empty(qkv, {rows(), width});
    const int64_t head = width / heads, item = 2;
    const auto part = [&](const Tensor& t, int64_t row, int64_t columns) {
      return cuda::Heads{static_cast<char*>(t.mutable_data_ptr()) + columns * item, tokens * row, head, row};
    };
    cuda::Attention args;
    args.q = part(qkv, 3 * width, 0);
    args.k = part(qkv, 3 * width, width);
    args.v = part(qkv, 3 * width, 2 * width);
    args.out = part(out, width, 0);
    args.sequences = static_cast<int>(batch);
    args.heads = heads;
    args.queries = args.keys = args.longest = static_cast<int>(tokens);
    args.head_dim = static_cast<int>(head);
    args.scale = scale;
    stream.check(cuda::launch_attention(args, dtype, stream));
    return out;
  }
};

// z' = z + γ₁ MSA(LN(z)), z'' = z' + γ₂ MLP(LN(z')) for each block, by one call of the dispatcher. parameters: for each
// block norm1's weight and bias, qkv's, proj's and γ₁, norm2's, fc1's, fc2's and γ₂; empty where there is none.
Tensor encoder_cuda(const Tensor& x, std::vector<Tensor> parameters, std::vector<double> eps, int64_t heads,
                    double scale, const std::string& activation) {
  FASTVIT_CHECK(x.dim() == 3 && x.is_contiguous(), kOp, ": x must have shape (B, N, D) and be contiguous");
  const size_t depth = parameters.size() / kPerBlock;
  FASTVIT_CHECK(depth * kPerBlock == parameters.size() && 2 * depth == eps.size(), kOp, ": a block has ", kPerBlock,
                " parameters and 2 eps");
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
  FASTVIT_CHECK(heads > 0 && width % (8 * heads) == 0 && width / heads <= cuda::kMaxHeadDim, kOp,
                ": the head dimension must be a multiple of 8 up to ", cuda::kMaxHeadDim);
  FASTVIT_CHECK(batch * heads < std::numeric_limits<int>::max() / 2 && tokens < std::numeric_limits<int>::max() / 2,
                kOp, ": too many heads or tokens");
  const cuda::Dtype dtype = cuda::dtype_of(x, kOp, "x", false);
  const Activation parsed = parse_activation(activation, kOp);
  if (x.numel() == 0 || depth == 0) return torch::stable::clone(x);
  const cuda::Stream stream(x, kOp);
  const Pass pass{batch, tokens, width, static_cast<int>(heads), static_cast<float>(scale), dtype, stream};
  // The residual stream, and the branch that the next normalisation adds to it.
  Tensor z = torch::stable::view(x, {pass.rows(), width}), branch = z;
  OptionalTensor factor;
  for (size_t b = 0; b < depth; b++) {
    const Tensor* p = parameters.data() + b * kPerBlock;
    Tensor y = pass.normalised(z, b ? &branch : nullptr, factor, true, p[0], p[1], eps[2 * b]);
    y = pass.attended(projected(y, p[2], p[3], 3 * width, "qkv_weight"));
    branch = projected(y, p[4], p[5], width, "proj_weight");
    y = pass.normalised(z, &branch, optional(p[6]), b > 0, p[7], p[8], eps[2 * b + 1]);
    y = cuda::product(y, p[9], optional(p[10]));
    y = cuda::finish(y, parsed, {}, false, dtype, stream, kOp);
    branch = projected(y, p[11], p[12], width, "fc2_weight");
    factor = optional(p[13]);
  }
  const Tensor sum = cuda::finish(branch, Activation::none, {factor, std::nullopt, z}, false, dtype, stream, kOp);
  return torch::stable::view(sum, {batch, tokens, width});
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_CUDA_LIBRARY, FASTVIT_CUDA_KEY, m) {
  m.impl("encoder", TORCH_BOX(&fastvit::encoder_cuda));
}
