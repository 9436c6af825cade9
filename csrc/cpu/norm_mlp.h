#pragma once

#include "cpu/kernels.h"

namespace fastvit {

// y = [x +] layer_scale * (activation(LN(x) fc1^T + b1) fc2^T + b2); the members of the three steps that only say where
// one puts what the next one takes are not read.
template <class T>
struct NormMlpArgs {
  LayerNormArgs<T> norm;
  GemmArgs<T> fc1;
  GemmArgs<T> fc2;
};

}  // namespace fastvit
