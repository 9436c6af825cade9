#pragma once

namespace fastvit {

enum class Activation { none, gelu, gelu_tanh, quick_gelu };

}  // namespace fastvit
