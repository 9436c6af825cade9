#pragma once

// Which instruction set the CPU kernels run with: the best that this machine has, or a lesser one on request.

#include <string>

namespace fastvit {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

Isa best_compiled_isa();
Isa detected_isa();
Isa active_isa();
const char* name_of(Isa isa);
// Empty = the best. Throws on an unknown name or an instruction set that this machine lacks.
void force_isa(const std::string& name);

}  // namespace fastvit
