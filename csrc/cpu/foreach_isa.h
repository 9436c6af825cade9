// Compiles the file named by FASTVIT_KERNELS once per instruction set, each time in a namespace of its own and with
// that instruction set allowed for its functions only: the rest of the binary runs on any CPU of the architecture.
// No include guard on purpose. Kernel files may use std:: functions only where they are certain to be inlined: an
// out-of-line copy would be shared with the rest of the program, instruction set and all.

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTVIT_X86 1
#pragma GCC diagnostic push
#if !defined(__clang__)
// GCC 12 warns about its own intrinsics (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define FASTVIT_X86 0
#endif

#ifdef FASTVIT_KERNELS

#if defined(__GNUC__)
// Vectors wider than the baseline's registers appear only in functions that are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/activation.h"
#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

#define FASTVIT_ISA_PORTABLE 0
#define FASTVIT_ISA_AVX2 1
#define FASTVIT_ISA_AVX512 2
#define FASTVIT_ISA_AVX512_BF16 3

#define FASTVIT_ISA FASTVIT_ISA_PORTABLE
namespace fastvit::portable {
#include FASTVIT_KERNELS
}
#undef FASTVIT_ISA

#if FASTVIT_X86

#define FASTVIT_ISA FASTVIT_ISA_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace fastvit::avx2 {
#include FASTVIT_KERNELS
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTVIT_ISA

#define FASTVIT_ISA FASTVIT_ISA_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
namespace fastvit::avx512 {
#include FASTVIT_KERNELS
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTVIT_ISA

#define FASTVIT_ISA FASTVIT_ISA_AVX512_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
namespace fastvit::avx512_bf16 {
#include FASTVIT_KERNELS
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTVIT_ISA

// The address of one function in the namespace of the active instruction set; amx is the last one with tiles.
#define FASTVIT_SELECT(...)                                                                      \
  (::fastvit::active_isa() >= ::fastvit::Isa::avx512_bf16 ? &::fastvit::avx512_bf16::__VA_ARGS__ \
   : ::fastvit::active_isa() == ::fastvit::Isa::avx512    ? &::fastvit::avx512::__VA_ARGS__      \
   : ::fastvit::active_isa() == ::fastvit::Isa::avx2      ? &::fastvit::avx2::__VA_ARGS__        \
                                                          : &::fastvit::portable::__VA_ARGS__)
#else
#define FASTVIT_SELECT(...) (&::fastvit::portable::__VA_ARGS__)
#endif

#endif
