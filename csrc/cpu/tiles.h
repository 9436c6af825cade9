#pragma once

// The matrix unit of newer Intel processors, AMX: what it reaches on its own registers, four sums at a time.

#include <cstdint>

namespace fastvit {

// Whether this processor has it and the system lets this process use it.
bool has_tiles();
float multiply_tiles_bfloat16(int64_t steps);
float multiply_tiles_int8(int64_t steps);

}  // namespace fastvit
