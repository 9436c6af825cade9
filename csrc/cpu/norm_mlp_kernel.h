#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"
#include "cpu/normalise.h"
#include "cpu/product.h"
#include "cpu/epilogue.h"

// Rows that go through all three steps before the next, so that their hidden activations stay in the cache.
template <class T>
void norm_mlp(const NormMlpArgs<T>& g) {
  using C = compute_t<T>;
  using A = unit_t<C>;
  const int64_t m = g.fc1.m, width = g.fc1.k, hidden = g.fc1.n, out = g.fc2.n;
  if (m == 0) return;
  const Weight<T> fc1(g.fc1), fc2(g.fc2);
  const Groups<C> groups(m, hidden);
  const int64_t size = groups.rows * (row_units<C>(width) + row_units<C>(hidden)) + sums_size<C>(groups.rows);
  const Scratch scratch(thread_count() * size * sizeof(A));
  for_each_unit(groups.count, 3 * groups.count, [&](Team::Worker& worker, int64_t begin, int64_t end) {
    A* const sums = scratch.as<A>() + worker.lane() * size;
    A* const normed = (worker.lanes() > 1 ? scratch.as<A>() : sums) + sums_size<C>(groups.rows);
    A* const activated = normed + groups.rows * row_units<C>(width);
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = groups.begin(group);
      const Tiles tiles(groups.begin(group + 1) - first);
      worker.each(tiles.count, [&](int64_t t) {
        for (int64_t i = 0; i < tiles.height(t); i++) {
          const int64_t row = first + tiles.begin(t) + i;
          const Normaliser<T> normalise(g.norm.x + row * g.norm.x_stride, width, g.norm.eps, g.norm.weight,
                                        g.norm.bias);
          if (g.norm.mean) g.norm.mean[row] = normalise.mean + normalise.shift;
          if (g.norm.rstd) g.norm.rstd[row] = normalise.rstd;
          put_row<C>(normed + tiles.begin(t) * row_units<C>(width) + i * kLanes<A>, tiles.height(t) * kLanes<A>, width,
                     [&](int64_t k) { return normalise(k); });
        }
      });
      worker.each(panels_of<C>(hidden), [&](int64_t p) {
        multiply_panel(
            Lines<C>{normed, tiles, width}, fc1.panel(p), p * kPanel<C>, hidden, sums, [](int64_t, int64_t) {},
            [&](int64_t t, int64_t column, const A* values) {
              with_epilogue(g.fc1, column, [&](const auto& epilogue) {
                put_panel<C>(activated, tiles, t, column, hidden, [&](int64_t i, Vec<A>* v) {
                  epilogue.preactivation(first + tiles.begin(t) + i, values + i * kPanel<C>, v);
                  for (int j = 0; j < kPanelVectors; j++) v[j] = Rounded<C>::activated(v[j], g.fc1.activation);
                });
              });
            });
      });
      worker.each(panels_of<C>(out), [&](int64_t p) {
        multiply_panel(
            Lines<C>{activated, tiles, hidden}, fc2.panel(p), p * kPanel<C>, out, sums,
            [&](int64_t t, int64_t column) { fetch_tile(g.fc2, first + tiles.begin(t), tiles.height(t), column); },
            [&](int64_t t, int64_t column, const A* values) {
              epilogue_tile(g.fc2, first + tiles.begin(t), tiles.height(t), column, values);
            });
      });
    }
  });
}
