#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "cpu/foreach_isa.h"
#include "cpu/tiles.h"

namespace fastvit {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

Isa detect() {
#if FASTVIT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return has_tiles() ? Isa::amx : Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{detected_isa()};
  return isa;
}

std::string cpu_isa(std::string name) {
  force_isa(name);
  return name_of(active_isa());
}

}  // namespace

Isa best_compiled_isa() { return FASTVIT_TILES ? Isa::amx : FASTVIT_X86 ? Isa::avx512_bf16 : Isa::portable; }

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

void force_isa(const std::string& name) {
  if (name.empty()) {
    active() = detected_isa();
    return;
  }
  for (Isa isa : kAll) {
    if (name != name_of(isa)) continue;
    STD_TORCH_CHECK(isa <= detected_isa(), "FASTVIT_CPU=", name, ": this CPU has only ", name_of(detected_isa()));
    active() = isa;
    return;
  }
  STD_TORCH_CHECK(false, "FASTVIT_CPU must be portable, avx2, avx512, avx512_bf16 or amx, got ", name);
}

}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastvit::cpu_isa));
}
