#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"

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

// Fetches part of the next panel of the weight into the L2 cache while this one is multiplied.
template <class T>
FASTVIT_INLINE void prefetch_panel(const GemmArgs<T>& g, int64_t column, int64_t part, int64_t parts) {
  constexpr int64_t width = kPanel<accumulator_t<T>>, line = 64 / sizeof(T);
  const int64_t end = column + width * (part + 1) / parts;
  for (int64_t n = column + width * part / parts; n < end && n < g.n; n++)
    for (int64_t k = 0; k < g.k; k += line) __builtin_prefetch(g.weight + n * g.weight_stride + k, 0, 2);
}

// The rows [first, first + rows): x is packed once, the weight panel by panel, and a panel meets every tile of x.
template <class T>
void gemm_block(const GemmArgs<T>& g, int64_t first, int64_t rows) {
  using A = accumulator_t<T>;
  constexpr int lanes = kLanes<A>, panel_width = kPanel<A>, tile_rows = kTileRows<A>;
  const int64_t units = units_of(g.k, Units<T>::kPerUnit), stride = tile_stride<A>(units);
  const int64_t panels = (g.n + panel_width - 1) / panel_width, tiles = (rows + tile_rows - 1) / tile_rows;
  const Scratch packed(tiles * stride * sizeof(A));
  A* const packed_x = packed.as<A>();
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
  // Packing a panel costs about as much as 16 rows of x; less than a few million operations are not worth a thread.
  const int64_t grain = 4000000 / (2 * panel_width * g.k * (rows / chunks + 16) + 1) + 1;
  parallel_for(panels * chunks, grain, [&](int64_t begin, int64_t end) {
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
      const int64_t tile = tiles * chunk / chunks, tile_end = tiles * (chunk + 1) / chunks;
      for (int64_t t = tile; t < tile_end; t++) {
        const int64_t row = tile_begin(t), count = tile_begin(t + 1) - row;
        if (item + chunks < end) prefetch_panel(g, column + panel_width, t, tiles);
        micro_of<T, kPanelVectors, tile_rows>(count)(packed_x + t * stride, panel.as<A>(), panel_width, units, sums);
        for (int64_t i = 0; i < count; i++) epilogue_row(g, row + i, column, sums + i * panel_width);
      }
    }
  });
}

template <class T>
void gemm(const GemmArgs<T>& g) {
  if (g.n == 0) return;
  for_row_blocks(g.m, [&](int64_t first, int64_t rows) { gemm_block(g, first, rows); });
}
