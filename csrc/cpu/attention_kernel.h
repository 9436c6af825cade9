#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"
#include "cpu/attention_head.h"

template <class T>
void attention(const AttentionArgs<T>& g) {
  using A = unit_t<compute_t<T>>;
  if (g.queries == 0 || g.head_dim == 0) return;
  HeadBuffers<T> buffers(g.keys, g.head_dim);
  const Tiles tiles(g.queries);
  const int64_t pairs = g.batch * g.heads, threads = thread_count();
  int64_t splits = pairs % threads == 0 || pairs >= 4 * threads ? 1 : (4 * threads + pairs - 1) / (pairs + 1);
  splits = splits < tiles.count ? splits : tiles.count;
  const Scratch scratch(threads * buffers.size() * sizeof(A));
  Team team(threads, 1);
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; lane++) {
      HeadBuffers<T> mine = buffers;
      mine.place(scratch.as<A>() + lane * buffers.size());
      int64_t packed = -1;
      Team::Worker(team, lane).each(pairs * splits, [&](int64_t item) {
        const int64_t pair = item / splits, split = item % splits, batch = pair / g.heads, head = pair % g.heads;
        if (pair != packed) pack_head(g, mine, batch, head);
        packed = pair;
        T* out = g.out + (batch * g.queries * g.heads + head) * g.head_dim;
        for (int64_t t = tiles.count * split / splits; t < tiles.count * (split + 1) / splits; t++)
          attend(g, mine, batch, head, tiles.begin(t), tiles.height(t), [&](int64_t query, int64_t e, Vec<A> v) {
            store(out + query * g.heads * g.head_dim + e, v, g.head_dim - e);
          });
      });
    }
  });
}
