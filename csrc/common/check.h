#pragma once

// Checks and views of the tensors that enter an op. The Python contract has validated everything already with
// better messages: these keep a direct call of the native op from touching memory that is not its own.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/activation.h"
#include "common/dtype.h"

namespace fastvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define FASTVIT_CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

inline void check_like(const Tensor& t, const Tensor& like, ScalarType dtype, const char* op, const char* name) {
  FASTVIT_CHECK(t.device() == like.device(), op, ": ", name, " must be on the device of the first argument");
  FASTVIT_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have dtype ", torch::headeronly::toString(dtype),
                ", got ", torch::headeronly::toString(t.scalar_type()));
}

// Whether bfloat16 tensors meet float32 parameters.
inline bool is_autocast(const Tensor& t, const Tensor& parameter) {
  return t.scalar_type() == ScalarType::BFloat16 && parameter.scalar_type() == ScalarType::Float;
}

// A matrix whose rows are contiguous and any stride apart.
template <class T>
struct Rows {
  const T* data = nullptr;
  int64_t stride = 0;

  const T* operator[](int64_t row) const { return data + row * stride; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
Rows<T> rows(const Tensor& t, int64_t m, int64_t n, const Tensor& like, const char* op, const char* name) {
  check_like(t, like, like.scalar_type(), op, name);
  FASTVIT_CHECK(t.dim() == 2 && t.size(0) == m && t.size(1) == n, op, ": ", name, " must have shape (", m, ", ", n,
                ")");
  FASTVIT_CHECK(m == 0 || n <= 1 || t.stride(1) == 1, op, ": ", name, " must have contiguous rows");
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0)};
}

template <class T>
Rows<T> rows(const OptionalTensor& t, int64_t m, int64_t n, const Tensor& like, const char* op, const char* name) {
  return t ? rows<T>(*t, m, n, like, op, name) : Rows<T>{};
}

template <class T>
const T* vector(const OptionalTensor& t, int64_t n, const Tensor& like, ScalarType dtype, const char* op,
                const char* name) {
  if (!t) return nullptr;
  check_like(*t, like, dtype, op, name);
  FASTVIT_CHECK(t->dim() == 1 && t->size(0) == n, op, ": ", name, " must have shape (", n, ",)");
  FASTVIT_CHECK(n <= 1 || t->stride(0) == 1, op, ": ", name, " must be contiguous");
  return static_cast<const T*>(t->const_data_ptr());
}

template <class T>
const T* vector(const OptionalTensor& t, int64_t n, const Tensor& like, const char* op, const char* name) {
  return vector<T>(t, n, like, like.scalar_type(), op, name);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size) {
  return empty(like, size, like.scalar_type());
}

// Row statistics are float32, double for double.
inline ScalarType statistics_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Activation parse_activation(const std::string& name, const char* op) {
  if (name == "none") return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "quick_gelu") return Activation::quick_gelu;
  FASTVIT_CHECK(false, op, ": activation must be none, gelu, gelu_tanh or quick_gelu, got ", name);
  return Activation::none;
}

// Calls f with a value of the C++ type of dtype: dispatch(t, "op", [&](auto tag) { using T = decltype(tag); ... }).
template <class F>
auto dispatch(const Tensor& t, const char* op, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bfloat16{});
    case ScalarType::Half:
      return f(float16{});
    case ScalarType::Double:
      return f(double{});
    default:
      FASTVIT_CHECK(false, op, ": dtype ", torch::headeronly::toString(t.scalar_type()), " is not supported");
      return f(float{});
  }
}

}  // namespace fastvit
