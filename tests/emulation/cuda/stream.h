// Stands in for csrc/cuda/stream.h: the ops take CPU tensors, and there are no streams.
#pragma once

#include "common/check.h"

#define FASTVIT_CUDA_LIBRARY fastvit_emulated
#define FASTVIT_CUDA_KEY CPU

namespace fastvit::cuda {

class Stream {
 public:
  Stream(const Tensor&, const char* op) : op_(op) {}

  operator void*() const { return nullptr; }

  void check(const char* error) const {
    FASTVIT_CHECK(error == nullptr, op_, ": CUDA launch failed: ", error ? error : "");
  }

 private:
  const char* op_;
};

}  // namespace fastvit::cuda
