#include "cpu/kernels.h"

#define FASTVIT_KERNELS "cpu/gemm_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastvit {

template <class T>
void gemm(const GemmArgs<T>& args) {
  FASTVIT_SELECT(gemm<T>)(args);
}

template void gemm(const GemmArgs<float>&);
template void gemm(const GemmArgs<double>&);
template void gemm(const GemmArgs<bfloat16>&);
template void gemm(const GemmArgs<float16>&);

}  // namespace fastvit
