// Python.h first, as it demands.
#include <pybind11/pybind11.h>

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

STABLE_TORCH_LIBRARY(fastvit_native, m) {
  m.def(
      "layer_norm(Tensor x, Tensor? residual, Tensor? layer_scale, Tensor? weight, Tensor? bias, float eps, "
      "bool to_bfloat16=False, Tensor? sample_scale=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor mean, Tensor rstd, Tensor? weight, Tensor? x, "
      "Tensor? layer_scale, Tensor? sample_scale=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool relu) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool relu) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, Tensor? cu_seqlens=None, "
      "int max_seqlen=0) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, Tensor(b!) "
      "dk, "
      "Tensor(c!) dv, Tensor? mask, bool causal, float scale, Tensor? cu_seqlens=None, int max_seqlen=0) -> ()");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale, Tensor? residual, str activation, "
      "bool keep_preact, Tensor? packed, Tensor? sample_scale=None) -> (Tensor, Tensor)");
  m.def("activation_backward(Tensor dy, Tensor preact, str activation) -> Tensor");
  m.def(
      "norm_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, float eps, str activation, bool residual, bool keep, "
      "Tensor? fc1_packed, Tensor? fc2_packed, Tensor? sample_scale=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "patch_embed(Tensor image, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, "
      "Tensor? pixel_scale, Tensor? pixel_shift, Tensor? packed) -> Tensor");
  // A linear layer's weight as the CPU kernels read it, for the active instruction set: an opaque uint8 tensor.
  m.def("pack_weight(Tensor weight, str compute) -> Tensor");
  // The weight again, to the bit, in what it was packed for; int8 does not hold it.
  m.def("unpack_weight(Tensor packed) -> Tensor");
  // A number that changes, most likely, when the tensors' numbers do: it reads a few of each. With addresses, also when
  // they move or the kernels' instruction set is another.
  m.def("fingerprint(Tensor[] tensors, bool addresses) -> int");
  m.def(
      "matmul(Tensor a, Tensor b, Tensor? preact=None, str activation=\"none\", bool wide=False) -> (Tensor, Tensor)");
  m.def("column_sum(Tensor x) -> Tensor");
  m.def("encoder(Tensor x, Tensor[] parameters, float[] eps, int heads, float scale, str activation) -> Tensor");
  // Chooses the CPU kernels' instruction set ("" = the best) and answers its name.
  m.def("cpu_isa(str name) -> str");
  // GFLOP/s of multiply-adds on registers alone, on all threads, for some milliseconds.
  m.def("cpu_peak(str compute) -> float");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = FASTVIT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch_target"] = pybind11::make_tuple(TORCH_FEATURE_VERSION >> 56, (TORCH_FEATURE_VERSION >> 48) & 0xff);
  pybind11::list compiled;
  for (int isa = 0; isa <= static_cast<int>(fastvit::best_compiled_isa()); isa++)
    compiled.append(fastvit::name_of(static_cast<fastvit::Isa>(isa)));
  info["cpu_compiled"] = compiled;
  info["cpu_detected"] = fastvit::name_of(fastvit::detected_isa());
  info["cpu_active"] = fastvit::name_of(fastvit::active_isa());
  // Empty in a build without CUDA.
  info["cuda_architectures"] = pybind11::str(FASTVIT_CUDA).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of fastvit; the operators are in torch.ops.fastvit_native.";
  module.def("build_info", &build_info);
}
