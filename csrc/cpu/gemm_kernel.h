#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"
#include "cpu/product.h"
#include "cpu/epilogue.h"

template <class T, class V, class Y>
void gemm(const GemmArgs<T, V, Y>& g) {
  using C = compute_t<T>;
  using A = unit_t<C>;
  if (g.n == 0 || g.m == 0) return;
  const Weight<T, V> weight(g);
  const Groups<C> groups(g.m, g.k);
  const int64_t row = row_units<C>(g.k), size = groups.rows * row + sums_size<C>(groups.rows);
  const Scratch scratch(thread_count() * size * sizeof(A));
  for_each_unit(groups.count, 2 * groups.count, [&](Team::Worker& worker, int64_t begin, int64_t end) {
    A* const sums = scratch.as<A>() + worker.lane() * size;
    A* const lines = (worker.lanes() > 1 ? scratch.as<A>() : sums) + sums_size<C>(groups.rows);
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = groups.begin(group);
      const Tiles tiles(groups.begin(group + 1) - first);
      worker.each(tiles.count, [&](int64_t t) {
        const int64_t at = first + tiles.begin(t);
        if (g.x_by_columns)
          pack_columns_as_lines<C>(g.x + at, g.x_stride, tiles.height(t), g.k, lines + tiles.begin(t) * row, g.m - at);
        else
          pack_lines<C>(g.x + at * g.x_stride, g.x_stride, tiles.height(t), g.k, lines + tiles.begin(t) * row);
      });
      worker.each(panels_of<C>(g.n), [&](int64_t p) {
        multiply_panel(
            Lines<C>{lines, tiles, g.k}, weight.panel(p), p * kPanel<C>, g.n, sums,
            [&](int64_t t, int64_t column) { fetch_tile(g, first + tiles.begin(t), tiles.height(t), column); },
            [&](int64_t t, int64_t column, const A* values) {
              epilogue_tile(g, first + tiles.begin(t), tiles.height(t), column, values);
            });
      });
    }
  });
}
