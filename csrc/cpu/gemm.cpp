#include "cpu/kernels.h"

#define FASTVIT_KERNELS "cpu/gemm_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {

template <class T, class V, class Y>
void gemm(const GemmArgs<T, V, Y>& args) {
  FASTVIT_SELECT(gemm<T, V, Y>)(args);
}

template void gemm(const GemmArgs<float>&);
template void gemm(const GemmArgs<double>&);
template void gemm(const GemmArgs<bfloat16>&);
template void gemm(const GemmArgs<float16>&);
template void gemm(const GemmArgs<bfloat16, float, bfloat16>&);
template void gemm(const GemmArgs<bfloat16, float, float>&);
template void gemm(const GemmArgs<bfloat16, bfloat16, float>&);

}  // namespace fastvit
