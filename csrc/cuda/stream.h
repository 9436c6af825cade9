#pragma once

// Where PyTorch's current device and stream come from, and what the ops are registered for: the part of the glue that
// needs a GPU (tests/emulation has another one).

#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"

#define FASTVIT_CUDA_LIBRARY fastvit_native
#define FASTVIT_CUDA_KEY CUDA

// Weak, so that these objects also load beside a torch without CUDA. The stable ABI of torch 2.10 has no other word for
// the native stream.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastvit::cuda {

// Makes the tensor's device the current one; launches go to PyTorch's stream there.
class Stream {
 public:
  Stream(const Tensor& t, const char* op) : op_(op), guard_(t.get_device_index()) {
    FASTVIT_CHECK(aoti_torch_get_current_cuda_stream, op, ": this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }

  operator void*() const { return stream_; }

  void check(const char* error) const {
    FASTVIT_CHECK(error == nullptr, op_, ": CUDA launch failed: ", error ? error : "");
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fastvit::cuda
