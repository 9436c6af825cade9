#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fastvit::cuda {

// How attention is cut into blocks. A block's warps own rows, 16 or 32 at a time, and go over the rows of another pair
// of tensors in shared memory: keys and values for queries, queries and gradients for keys. These either lie there
// whole (one stage) or come by, a stage being computed on while the next one is on its way.
struct AttentionPlan {
  int warps = 4;
  int heads = 1;        // of a block
  int units = 1;        // of `rows` rows, of a head in a block
  int row_blocks = 1;   // of a head
  int stage_rows = 16;  // a multiple of 16
  int stages = 1;       // of the whole pair; more than one: two buffers
  bool streams = false;
  int64_t groups = 0;  // of heads
  size_t shared = 0;
};

struct AttentionShape {
  int64_t heads = 0;       // of all sequences
  int own = 0, other = 0;  // rows, the most
  int row_bytes = 0;       // in shared memory
  int rows = 16;           // that a warp takes at a time
  int staged = 16;         // rows of each warp's own in shared memory
  int extra_bytes = 0;     // with each row of a stage
  int registers = 255;     // of a thread, the most
  bool stays = false;      // whether the pair may lie in shared memory whole
};

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// shared_limit: what a block may have; processors: of the device.
inline AttentionPlan plan_attention(const AttentionShape& shape, int shared_limit, int processors) {
  constexpr int kMaxWarps = 8, kMinWarps = 4, kStageRows = 64;
  AttentionPlan plan;
  const int64_t pair_bytes = 2 * int64_t{shape.row_bytes} + shape.extra_bytes;
  const int64_t staging = int64_t{shape.staged} * shape.row_bytes;
  const int padded = static_cast<int>(divided_up(std::max(shape.other, 1), 16) * 16);
  const int units = static_cast<int>(divided_up(shape.own, shape.rows));
  // Two blocks of a multiprocessor must have their pairs there: one computes while the other one waits for memory.
  const bool resident = shape.stays && padded * pair_bytes + kMinWarps * staging <= shared_limit / 2;
  plan.stage_rows = resident ? padded : kStageRows;
  plan.streams = !resident;
  plan.stages = resident ? 1 : static_cast<int>(divided_up(padded, kStageRows));
  if (resident) {
    // Few rows: several heads share a block. Few heads: several blocks share a head, so that no multiprocessor idles.
    const int64_t wanted = 2 * int64_t{processors};
    while (plan.heads * 2 * units <= kMaxWarps && shape.heads / (plan.heads * 2) >= wanted &&
           plan.heads * 2 * padded * pair_bytes + kMaxWarps * staging <= shared_limit / 3)
      plan.heads *= 2;
    const int64_t split = std::min<int64_t>(units, divided_up(wanted, std::max<int64_t>(shape.heads, 1)));
    plan.units = plan.heads > 1 ? units : static_cast<int>(divided_up(units, split));
  }
  // As many warps at work on a multiprocessor as can be.
  double best = -1;
  for (int warps = kMaxWarps; warps >= kMinWarps; warps--) {
    const int64_t own = resident ? plan.heads * plan.units : units, rounds = divided_up(own, warps);
    const int64_t shared = (resident ? plan.heads : 2) * plan.stage_rows * pair_bytes + warps * staging;
    const int64_t blocks =
        std::min<int64_t>(65536 / (32 * warps * shape.registers), (shared_limit + 1024) / (shared + 1024));
    const double busy = static_cast<double>(blocks * own) / static_cast<double>(rounds);
    if (busy <= best) continue;
    best = busy;
    plan.warps = warps;
    plan.shared = static_cast<size_t>(shared);
  }
  if (!resident) plan.units = plan.warps;
  plan.row_blocks = static_cast<int>(divided_up(units, plan.units));
  plan.groups = divided_up(shape.heads, plan.heads);
  return plan;
}

}  // namespace fastvit::cuda
