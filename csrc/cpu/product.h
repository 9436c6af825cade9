// Matrix products on packed operands. Included inside the namespace of an instruction set, after micro.h.

// A group of rows as lines: what one thread works on while it goes through the panels of a weight.
template <class C>
struct Lines {
  const unit_t<C>* data;
  Tiles tiles;
  int64_t k;

  const unit_t<C>* tile(int64_t t) const { return data + tiles.begin(t) * row_units<C>(k); }
};

// Rows of a group whose lines fill `share` of the cache; weights come from further away once per group.
template <class C>
int64_t group_rows(int64_t k, double share) {
  const int64_t fitting = static_cast<int64_t>(share * l2_bytes()) / (row_units<C>(k) * sizeof(unit_t<C>) + 1);
  const int64_t tiles = fitting / kTileRows;
  return (tiles < 2 ? 2 : tiles > 16 ? 16 : tiles) * kTileRows;
}

template <class C>
int64_t sums_size(int64_t rows) {
  return (rows + kTileRows) * kPanel<C>;
}

// One panel of a weight with every row of a group; epilogue(row, column, sums) gets kPanel sums of a row.
template <class C, class E>
FASTVIT_INLINE void multiply_panel(const Lines<C>& x, const unit_t<C>* panel, int64_t column, int64_t columns,
                                   unit_t<C>* sums, const E& epilogue) {
  constexpr int64_t lanes = kLanes<unit_t<C>>, width = kPanel<C>;
  const int64_t units = units_of<C>(x.k), chains = (units + kChain - 1) / kChain;
  const int64_t chain = ((units + chains - 1) / (chains ? chains : 1) + lanes - 1) / lanes * lanes;
  int64_t begin = 0;
  do {
    const int64_t count = units - begin < chain ? units - begin : chain, bytes = count * width * sizeof(unit_t<C>);
    const unit_t<C>* b = panel + begin * width;
    const char* ahead = reinterpret_cast<const char*>(b) + bytes;
    for (int64_t t = 0; t < x.tiles.count; t++) {
      const int64_t height = x.tiles.height(t), row = x.tiles.begin(t);
      unit_t<C>* out = sums + row * width;
      const auto tile = columns - column > lanes ? micro_of<C, kPanelVectors>(height) : micro_of<C, 1>(height);
      const bool fetch = t * count * 32 < bytes;
      tile(x.tile(t) + begin * height, b, width, count, out, width, begin > 0,
           fetch ? ahead + t * count * 32 : reinterpret_cast<const char*>(b));
      if (begin + count >= units)
        for (int64_t i = 0; i < height; i++) epilogue(row + i, column, out + i * width);
    }
    begin += count;
  } while (begin < units);
}
