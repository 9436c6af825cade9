#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"

// Rows of x packed at a time: enough to pay for packing a panel of the weight, few enough to stay in the L2/L3 caches.
constexpr int64_t kBlockRows = 448;

template <class T>
FASTVIT_INLINE void epilogue_row(const GemmArgs<T>& g, int64_t row, int64_t column, const accumulator_t<T>* sums) {
  using A = accumulator_t<T>;
  const T* residual = g.residual ? g.residual + row % g.residual_period * g.residual_stride : nullptr;
  T* y = g.y + (row + (row / g.group + 1) * g.gap) * g.y_stride;
  for (int j = 0; j < kPanelVectors; j++, column += kLanes<A>, sums += kLanes<A>) {
    const int64_t n = g.n - column;
    if (n <= 0) return;
    Vec<A> v = load(sums);
    if (g.bias) v += load(g.bias + column, n);
    if (g.preact) store(g.preact + row * g.preact_stride + column, v, n);
    v = activate<A>(v, g.activation);
    if (g.layer_scale) v *= load(g.layer_scale + column, n);
    if (residual) v += load(residual + column, n);
    store(y + column, v, n);
  }
}

template <class T>
void gemm(const GemmArgs<T>& g) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, panel_width = kPanel<A>, tile_rows = kTileRows<A>;
  if (g.m == 0 || g.n == 0) return;
  const int64_t units = units_of(g.k, Units<T>::kPerUnit);
  const int64_t blocks = (g.m + kBlockRows - 1) / kBlockRows;
  const int64_t panels = (g.n + panel_width - 1) / panel_width;
  const int64_t stride = tile_stride<A>(units);
  const int64_t most_tiles = (g.m / blocks + 1 + tile_rows - 1) / tile_rows;
  const Scratch packed(most_tiles * stride * sizeof(A));
  A* const packed_x = packed.as<A>();
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = g.m * block / blocks, rows = g.m * (block + 1) / blocks - first;
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    const auto tile_begin = [&](int64_t tile) { return first + rows * tile / tiles; };
    parallel_for(tiles, 65536 / (units * tile_rows + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const int64_t row = tile_begin(t);
        pack(g.x + row * g.x_stride, g.x_stride, tile_begin(t + 1) - row, g.k, packed_x + t * stride, tile_rows);
      }
    });
    // Few panels for many threads: the rows are split too, at the price of packing a panel more than once.
    const int64_t threads = thread_count();
    int64_t chunks = panels % threads == 0 ? 1 : (4 * threads + panels - 1) / panels;
    chunks = chunks < tiles ? chunks : tiles;
    parallel_for(panels * chunks, 1, [&](int64_t begin, int64_t end) {
      const Scratch panel(units * panel_width * sizeof(A) + 64);
      alignas(64) A sums[tile_rows * panel_width];
      int64_t in_panel = -1;
      for (int64_t item = begin; item < end; item++) {
        const int64_t p = item / chunks, chunk = item % chunks, column = p * panel_width;
        if (p != in_panel) {
          for (int v = 0; v < kPanelVectors; v++) {
            const int64_t n = column + v * lanes;
            pack(g.weight + n * g.weight_stride, g.weight_stride, g.n - n, g.k, panel.as<A>() + v * lanes, panel_width);
          }
          in_panel = p;
        }
        for (int64_t t = tiles * chunk / chunks; t < tiles * (chunk + 1) / chunks; t++) {
          const int64_t row = tile_begin(t), count = tile_begin(t + 1) - row;
          micro_of<T, kPanelVectors, tile_rows>(count)(packed_x + t * stride, panel.as<A>(), panel_width, units, sums);
          for (int64_t i = 0; i < count; i++) epilogue_row(g, row + i, column, sums + i * panel_width);
        }
      }
    });
  }
}
