#pragma once

namespace fastvit::cuda {

enum class Dtype { float32, float16, bfloat16 };

}  // namespace fastvit::cuda
