#include "cpu/packed.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

#include "cpu/isa.h"

#define FASTVIT_KERNELS "cpu/packed_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {
namespace {

constexpr const char* kOp = "pack_weight";

Compute parse_compute(const std::string& name) {
  if (name == "float32") return Compute::float32;
  if (name == "bfloat16") return Compute::bfloat16;
  if (name == "float64") return Compute::float64;
  if (name == "int8") return Compute::int8;
  FASTVIT_CHECK(false, kOp, ": compute must be float32, bfloat16, float64 or int8, got ", name);
  return Compute::float32;
}

int64_t panel_bytes(Compute compute, int64_t n, int64_t k) {
  switch (compute) {
    case Compute::bfloat16:
      return FASTVIT_SELECT(packed_bytes<bfloat16>)(n, k);
    case Compute::float64:
      return FASTVIT_SELECT(packed_bytes<double>)(n, k);
    case Compute::int8:
      return FASTVIT_SELECT(packed_int8_bytes)(n, k);
    default:
      return FASTVIT_SELECT(packed_bytes<float>)(n, k);
  }
}

template <class T>
void pack_int8(const Rows<T>& w, int64_t n, int64_t k, const PackedHeader& header, char* base) {
  float* const step = reinterpret_cast<float*>(base + sizeof(header));
  float* const sum = reinterpret_cast<float*>(base + sizeof(header) + header.vector_bytes());
  std::memset(step, 0, 2 * header.vector_bytes());
  const Scratch bytes(n * k);
  FASTVIT_SELECT(quantise_weight<T>)(w.data, w.stride, n, k, bytes.as<int8_t>(), step, sum);
  FASTVIT_SELECT(pack_bytes)(bytes.as<int8_t>(), n, k, base + header.panels());
}

Tensor pack_weight(const Tensor& weight, const std::string& compute_name) {
  FASTVIT_CHECK(weight.dim() == 2, kOp, ": weight must have shape (N, K)");
  const Compute compute = parse_compute(compute_name);
  FASTVIT_CHECK((compute == Compute::float64) == (weight.scalar_type() == ScalarType::Double), kOp,
                ": float64 weights are computed in float64, and no others");
  const int64_t n = weight.size(0), k = weight.size(1);
  const PackedHeader header{PackedHeader::kMagic, static_cast<int64_t>(active_isa()), static_cast<int64_t>(compute), n,
                            k};
  Tensor packed = empty(weight, {header.panels() + panel_bytes(compute, n, k)}, ScalarType::Byte);
  char* const base = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(base, &header, sizeof(header));
  dispatch(weight, kOp, [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> w = rows<T>(weight, n, k, weight, kOp, "weight");
    char* const panels = base + header.panels();
    if constexpr (std::is_same_v<T, double>)
      FASTVIT_SELECT(pack_panels<double, double>)(w.data, w.stride, n, k, panels);
    else if (compute == Compute::int8)
      pack_int8(w, n, k, header, base);
    else if (compute == Compute::bfloat16)
      FASTVIT_SELECT(pack_panels<bfloat16, T>)(w.data, w.stride, n, k, panels);
    else
      FASTVIT_SELECT(pack_panels<float, T>)(w.data, w.stride, n, k, panels);
  });
  return packed;
}

// The weight that was packed, in what it was packed for.
Tensor unpack_weight(const Tensor& packed) {
  const PackedWeight w = packed_weight(packed, -1, -1, "unpack_weight", "packed");
  const auto rows_of = [&](ScalarType dtype) { return empty(packed, {w.n, w.k}, dtype); };
  Tensor weight;
  if (w.compute == Compute::float32) {
    weight = rows_of(ScalarType::Float);
    FASTVIT_SELECT(unpack_panels<float>)(w.panels, w.n, w.k, data<float>(weight));
  } else if (w.compute == Compute::bfloat16) {
    weight = rows_of(ScalarType::BFloat16);
    FASTVIT_SELECT(unpack_panels<bfloat16>)(w.panels, w.n, w.k, data<bfloat16>(weight));
  } else {
    FASTVIT_CHECK(w.compute == Compute::float64, "unpack_weight: packed is int8, which does not hold the weight");
    weight = rows_of(ScalarType::Double);
    FASTVIT_SELECT(unpack_panels<double>)(w.panels, w.n, w.k, data<double>(weight));
  }
  return weight;
}

}  // namespace

PackedWeight packed_weight(const Tensor& t, int64_t n, int64_t k, const char* op, const char* name) {
  FASTVIT_CHECK(t.scalar_type() == ScalarType::Byte && t.dim() == 1 && t.is_contiguous() &&
                    t.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
                op, ": ", name, " must come from pack_weight");
  const char* const base = static_cast<const char*>(t.const_data_ptr());
  PackedHeader header;
  std::memcpy(&header, base, sizeof(header));
  FASTVIT_CHECK(header.magic == PackedHeader::kMagic, op, ": ", name, " must come from pack_weight");
  FASTVIT_CHECK(header.isa == static_cast<int64_t>(active_isa()), op, ": ", name,
                " was packed for another instruction set");
  if (n < 0) n = header.n;
  if (k < 0) k = header.k;
  FASTVIT_CHECK(header.n == n && header.k == k, op, ": ", name, " must be a packed weight of shape (", n, ", ", k,
                "), got (", header.n, ", ", header.k, ")");
  PackedWeight view;
  view.n = n;
  view.k = k;
  view.compute = static_cast<Compute>(header.compute);
  FASTVIT_CHECK(n >= 0 && k >= 0 && t.numel() == header.panels() + panel_bytes(view.compute, n, k), op, ": ", name,
                " is damaged");
  if (view.compute == Compute::int8) {
    view.step = reinterpret_cast<const float*>(base + sizeof(header));
    view.sum = reinterpret_cast<const float*>(base + sizeof(header) + header.vector_bytes());
  }
  view.panels = base + header.panels();
  return view;
}

}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&fastvit::pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&fastvit::unpack_weight));
}
