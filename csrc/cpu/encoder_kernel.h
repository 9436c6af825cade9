#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"
#include "cpu/normalise.h"
#include "cpu/product.h"
#include "cpu/attention_head.h"
#include "cpu/quantise.h"

// `count` elements of `from`, from the index `first` on, to those of `to` from `there` on.
template <class From, class To>
void copy(const void* from, int64_t first, void* to, int64_t there, int64_t count) {
  const From* source = static_cast<const From*>(from) + first;
  To* target = static_cast<To*>(to) + there;
  for (int64_t i = 0; i < count; i += kLanes<float>) store(target + i, load(source + i, count - i), count - i);
}
using Copy = decltype(copy<float, float>);

// Whole encoder blocks over a few images, by one thread alone or by all of them. Rows go through a block in groups that
// fit into a core's cache; only attention needs every row of its image. P is what is computed with, but for weights of
// int8. What the tokens are stored as is known to `read` and `write` alone: the class is compiled once for all of it.
template <class P>
class Encoder {
  using C = compute_t<P>;
  using A = unit_t<C>;
  static constexpr int64_t kLanesA = kLanes<A>;
  static_assert(sizeof(A) == 4, "int8 products share the memory of the others");

 public:
  Encoder(const EncoderArgs& args, Copy* read, Copy* write, int64_t images, int64_t lanes)
      : g_(args),
        read_(read),
        write_(write),
        rows_(images * args.tokens),
        images_(images),
        lanes_(lanes),
        limit_(group_rows<C>(args.hidden)),
        // Rows that fit into one cache are shared: each core then reads but its part of the weights.
        wave_(rows_ < lanes * 2 * kTileRows || rows_ <= limit_ ? 1 : lanes),
        groups_(wave_ * ((rows_ + wave_ * limit_ - 1) / (wave_ * limit_))),
        head_(args.tokens, args.width / args.heads) {
    splits_ = images * args.heads % lanes == 0 ? 1 : (4 * lanes + images * args.heads - 1) / (images * args.heads);
    const int64_t tiles = Tiles(args.tokens).count;
    splits_ = splits_ < tiles ? splits_ : tiles;
  }

  int64_t steps() const { return 2 + g_.depth * (1 + 8 * groups_ / wave_); }
  int64_t group_size() const { return (rows_ + groups_ - 1) / groups_; }

  // Bytes that the lanes share, and that each has for itself.
  int64_t shared_bytes() const {
    Encoder sized = *this;
    return sized.place(nullptr, nullptr);
  }
  int64_t lane_bytes() const {
    return aligned(sums_size<C>(group_size()) * sizeof(A)) + aligned(head_.size() * sizeof(A)) +
           aligned(g_.width * sizeof(float));
  }

  // Lays the buffers out from `shared` on and answers their bytes.
  int64_t place(char* shared, char* lanes) {
    int64_t used = 0;
    const auto take = [&](auto*& p, int64_t count) {
      p = shared ? reinterpret_cast<std::remove_reference_t<decltype(p)>>(shared + used) : nullptr;
      used += aligned(count * sizeof(*p));
    };
    const int64_t hidden_rows = wave_ * group_size();
    take(stream_, rows_ * g_.width);
    take(places_, rows_);
    take(lines_, rows_ * row_units<C>(g_.width));
    take(qkv_, rows_ * 3 * g_.width);
    take(hidden_, hidden_rows * row_units<C>(g_.hidden));
    if (g_.int8) {
      take(ranges_, rows_);
      take(hidden_ranges_, hidden_rows);
      take(bytes_, rows_ * row_units<int8_t>(g_.width));
      take(hidden_bytes_, hidden_rows * row_units<int8_t>(g_.hidden));
      take(attended_, rows_ * g_.width);
      take(activated_, hidden_rows * g_.hidden);
    }
    lane_memory_ = lanes;
    return used;
  }

  void run(Team::Worker& worker, int64_t image) {
    const int64_t first = image * g_.tokens * g_.width;
    char* memory = lane_memory_ + (lanes_ > 1 ? worker.lane() * lane_bytes() : 0);
    const auto take = [&](int64_t bytes) {
      return reinterpret_cast<A*>(std::exchange(memory, memory + aligned(bytes)));
    };
    sums_ = take(sums_size<C>(group_size()) * sizeof(A));
    head_.place(take(head_.size() * sizeof(A)));
    row_ = reinterpret_cast<float*>(memory);
    worker.each(groups_, [&](int64_t group) {
      const int64_t begin = begin_of(group), end = begin_of(group + 1);
      const Tiles tiles(end - begin);
      read_(g_.x, first + begin * g_.width, stream_, begin * g_.width, (end - begin) * g_.width);
      for (int64_t t = 0; t < tiles.count; t++)
        for (int64_t i = 0; i < tiles.height(t); i++) {
          const Place place = places_[begin + tiles.begin(t) + i] = {begin + tiles.begin(t), i, tiles.height(t)};
          // A row's last unit may be more than its elements; before a layer of int8, nobody writes whole lines.
          store(lines_ + place.template units<C>(g_.width) + (lines_of<C>(g_.width) - 1) * place.step(), Vec<A>{});
        }
    });
    for (int64_t b = 0; b < g_.depth; b++) {
      const BlockArgs& block = g_.blocks[b];
      for (int64_t wave = 0; wave < groups_; wave += wave_) {
        normalise(worker, wave, block.norm1_weight, block.norm1_bias, block.norm1_eps, block.qkv);
        project_qkv(worker, wave, block.qkv);
      }
      attend_heads(worker, is_int8(block.proj));
      for (int64_t wave = 0; wave < groups_; wave += wave_) {
        if (is_int8(block.proj)) quantise(worker, wave, attended_, g_.width, ranges_, bytes_, false);
        add_product(worker, wave, block.proj, false);
        normalise(worker, wave, block.norm2_weight, block.norm2_bias, block.norm2_eps, block.fc1);
        activate_hidden(worker, wave, block.fc1, is_int8(block.fc2));
        if (is_int8(block.fc2))
          quantise(worker, wave, activated_, block.fc2.weight.k, hidden_ranges_, hidden_bytes_, true);
        add_product(worker, wave, block.fc2, true);
      }
    }
    worker.each(groups_, [&](int64_t group) {
      const int64_t begin = begin_of(group) * g_.width, end = begin_of(group + 1) * g_.width;
      write_(stream_, begin, g_.y, first + begin, end - begin);
    });
  }

 private:
  // Where a row lies among the lines of all rows.
  struct Place {
    int64_t tile, row, height;  // the tile's first row, the row within it, the tile's rows
    template <class L>
    int64_t units(int64_t k) const {
      return tile * row_units<L>(k) + row * kLanesA;
    }
    int64_t step() const { return height * kLanesA; }
  };

  static int64_t aligned(int64_t bytes) { return (bytes + 127) / 64 * 64; }
  static bool is_int8(const LinearArgs& linear) { return linear.weight.compute == Compute::int8; }
  int64_t begin_of(int64_t group) const { return rows_ * group / groups_; }
  Tiles tiles_of(int64_t group) const { return Tiles(begin_of(group + 1) - begin_of(group)); }
  // The first row of a group in the buffers that hold one wave.
  int64_t wave_row(int64_t group, int64_t wave) const { return (group - wave) * group_size(); }

  // f(group, row) for every row of a wave.
  template <class F>
  void each_row(Team::Worker& worker, int64_t wave, const F& f) {
    constexpr int64_t kRows = 4;
    const int64_t chunks = (group_size() + kRows - 1) / kRows;
    worker.each(wave_ * chunks, [&](int64_t item) {
      const int64_t group = wave + item / chunks, begin = begin_of(group) + item % chunks * kRows;
      for (int64_t row = begin; row < begin + kRows && row < begin_of(group + 1); row++) f(group, row);
    });
  }

  void normalise(Team::Worker& worker, int64_t wave, const float* weight, const float* bias, double eps,
                 const LinearArgs& next) {
    each_row(worker, wave, [&](int64_t, int64_t row) {
      const Normaliser<float> normal(stream_ + row * g_.width, g_.width, eps, weight, bias);
      const Place& place = places_[row];
      if (is_int8(next)) {
        for (int64_t i = 0; i < g_.width; i += kLanes<float>) store(row_ + i, normal(i), g_.width - i);
        ranges_[row] = quantise_row(row_, g_.width, bytes_ + place.template units<int8_t>(g_.width), place.step());
      } else {
        put_row<C>(lines_ + place.template units<C>(g_.width), place.step(), g_.width,
                   [&](int64_t i) { return normal(i); });
      }
    });
  }

  template <class S>
  void quantise(Team::Worker& worker, int64_t wave, const S* source, int64_t k, RowRange* ranges, int32_t* bytes,
                bool by_wave) {
    each_row(worker, wave, [&](int64_t group, int64_t row) {
      const int64_t offset = by_wave ? wave_row(group, wave) - begin_of(group) : 0;
      Place place = places_[row];
      place.tile += offset;
      ranges[row + offset] =
          quantise_row(source + (row + offset) * k, k, bytes + place.template units<int8_t>(k), place.step());
    });
  }

  // f(group, tiles, tile, columns, numbers) for every tile of a wave and every panel of a weight; numbers(i, v) sets
  // the vectors of row i of the tile, bias included.
  template <class F>
  void multiply(Team::Worker& worker, int64_t wave, const LinearArgs& linear, bool by_wave, const F& f) {
    const PackedWeight& w = linear.weight;
    if (is_int8(linear))
      each_panel<int8_t>(worker, wave, linear, by_wave ? hidden_bytes_ : bytes_, by_wave,
                         [&](int64_t group, const Tiles& tiles, int64_t t, const auto& columns, const int32_t* values,
                             const Vec<float>* bias) {
                           const int64_t first = (by_wave ? wave_row(group, wave) : begin_of(group)) + tiles.begin(t);
                           const RowRange* range = (by_wave ? hidden_ranges_ : ranges_) + first;
                           Vec<float> step[kPanelVectors], sum[kPanelVectors];
                           for (int j = 0; j < kPanelVectors; j++) {
                             step[j] = columns.of(w.step, j);
                             sum[j] = columns.of(w.sum, j);
                           }
                           f(group, tiles, t, columns, [=](int64_t i, Vec<float>* v) {
                             for (int j = 0; j < kPanelVectors; j++) {
                               const VecI exact = load(values + i * kPanel<int8_t> + j * kLanesA);
                               v[j] = __builtin_convertvector(exact, Vec<float>) * (step[j] * range[i].step) +
                                      (sum[j] * range[i].low + bias[j]);
                             }
                           });
                         });
    else
      each_panel<C>(worker, wave, linear, by_wave ? hidden_ : lines_, by_wave,
                    [&](int64_t group, const Tiles& tiles, int64_t t, const auto& columns, const A* values,
                        const Vec<float>* bias) {
                      f(group, tiles, t, columns, [=](int64_t i, Vec<float>* v) {
                        for (int j = 0; j < kPanelVectors; j++)
                          v[j] = load(values + i * kPanel<C> + j * kLanesA) + bias[j];
                      });
                    });
  }

  template <class L, class F>
  void each_panel(Team::Worker& worker, int64_t wave, const LinearArgs& linear, const unit_t<L>* lines, bool by_wave,
                  const F& f) {
    const PackedWeight& w = linear.weight;
    const int64_t panels = panels_of<L>(w.n), size = units_of<L>(w.k) * kPanel<L>;
    // Few panels for many lanes: each is cut into parts of the rows.
    int64_t parts = lanes_ == 1 ? 1 : (4 * lanes_ + wave_ * panels - 1) / (wave_ * panels);
    const int64_t most = Tiles(group_size()).count;
    parts = parts < most ? parts : most;
    worker.each(wave_ * panels * parts, [&](int64_t item) {
      const int64_t part = item % parts, p = item / parts % panels, group = wave + item / parts / panels;
      const Tiles tiles = tiles_of(group);
      const unit_t<L>* mine = lines + (by_wave ? wave_row(group, wave) : begin_of(group)) * row_units<L>(w.k);
      const Lines<L> x{mine, tiles, w.k, tiles.count * part / parts, tiles.count * (part + 1) / parts};
      Vec<float> bias[kPanelVectors] = {};
      const Columns<false, A> columns{p * kPanel<L>, w.n};
      for (int j = 0; j < kPanelVectors && linear.bias; j++) bias[j] = columns.of(linear.bias, j);
      multiply_panel(
          x, static_cast<const unit_t<L>*>(w.panels) + p * size, p * kPanel<L>, w.n,
          reinterpret_cast<unit_t<L>*>(sums_), [](int64_t, int64_t) {},
          [&](int64_t t, int64_t column, const unit_t<L>* values) {
            with_columns<A>(column, w.n, [&](const auto& columns) { f(group, tiles, t, columns, values, bias); });
          });
    });
  }

  void project_qkv(Team::Worker& worker, int64_t wave, const LinearArgs& linear) {
    const int64_t n = linear.weight.n;
    multiply(worker, wave, linear, false,
             [&](int64_t group, const Tiles& tiles, int64_t t, const auto& columns, const auto& numbers) {
               P* out = qkv_ + (begin_of(group) + tiles.begin(t)) * n;
               for (int64_t i = 0; i < tiles.height(t); i++, out += n) {
                 Vec<float> v[kPanelVectors];
                 numbers(i, v);
                 columns.put(out, v);
               }
             });
  }

  void attend_heads(Team::Worker& worker, bool to_int8) {
    const int64_t head_dim = g_.width / g_.heads, row = 3 * g_.width;
    AttentionArgs<P> a;
    a.batch = images_;
    a.heads = g_.heads;
    a.queries = a.keys = g_.tokens;
    a.head_dim = head_dim;
    a.q = qkv_;
    a.k = qkv_ + g_.width;
    a.v = qkv_ + 2 * g_.width;
    for (int64_t* strides : {a.q_strides, a.k_strides, a.v_strides}) {
      strides[0] = g_.tokens * row;
      strides[1] = head_dim;
      strides[2] = row;
    }
    a.scale = g_.scale;
    const Tiles tiles(g_.tokens);
    int64_t packed = -1;
    worker.each(images_ * g_.heads * splits_, [&](int64_t item) {
      const int64_t pair = item / splits_, split = item % splits_, image = pair / g_.heads, h = pair % g_.heads;
      if (pair != packed) pack_head(a, head_, image, h);
      packed = pair;
      for (int64_t t = tiles.count * split / splits_; t < tiles.count * (split + 1) / splits_; t++)
        attend(a, head_, image, h, tiles.begin(t), tiles.height(t), [&](int64_t query, int64_t e, Vec<A> v) {
          const int64_t at = image * g_.tokens + query, column = h * head_dim + e;
          if (to_int8)
            store(attended_ + at * g_.width + column, v, head_dim - e);
          else
            put_run<C>(lines_ + places_[at].template units<C>(g_.width), places_[at].step(), column, head_dim - e, v);
        });
    });
  }

  void activate_hidden(Team::Worker& worker, int64_t wave, const LinearArgs& linear, bool to_int8) {
    if (g_.activation == Activation::gelu)
      activate_hidden(worker, wave, linear, to_int8, std::integral_constant<Activation, Activation::gelu>{});
    else
      activate_hidden(worker, wave, linear, to_int8, g_.activation);
  }

  template <class Chosen>
  void activate_hidden(Team::Worker& worker, int64_t wave, const LinearArgs& linear, bool to_int8, Chosen activation) {
    const int64_t n = linear.weight.n;
    multiply(worker, wave, linear, false,
             [&](int64_t group, const Tiles& tiles, int64_t t, const auto& columns, const auto& numbers) {
               const int64_t first = wave_row(group, wave);
               const auto activated = [&](int64_t i, Vec<A>* v) {
                 numbers(i, v);
                 for (int j = 0; j < kPanelVectors; j++) v[j] = Rounded<C>::activated(v[j], activation);
               };
               if (!to_int8)
                 return put_panel<C>(hidden_ + first * row_units<C>(n), tiles, t, columns.first, n, activated);
               P* out = activated_ + (first + tiles.begin(t)) * n;
               for (int64_t i = 0; i < tiles.height(t); i++, out += n) {
                 Vec<float> v[kPanelVectors];
                 activated(i, v);
                 columns.put(out, v);
               }
             });
  }

  void add_product(Team::Worker& worker, int64_t wave, const LinearArgs& linear, bool by_wave) {
    const int64_t n = linear.weight.n;
    multiply(worker, wave, linear, by_wave,
             [&](int64_t group, const Tiles& tiles, int64_t t, const auto& columns, const auto& numbers) {
               float* out = stream_ + (begin_of(group) + tiles.begin(t)) * n;
               Vec<float> scale[kPanelVectors];
               for (int j = 0; j < kPanelVectors; j++)
                 scale[j] = linear.layer_scale ? columns.of(linear.layer_scale, j) : Vec<float>{} + 1.0f;
               for (int64_t i = 0; i < tiles.height(t); i++, out += n) {
                 Vec<float> v[kPanelVectors];
                 numbers(i, v);
                 for (int j = 0; j < kPanelVectors; j++) v[j] = fma(v[j], scale[j], columns.of(out, j));
                 columns.put(out, v);
               }
             });
  }

  const EncoderArgs& g_;
  Copy *read_, *write_;
  int64_t rows_, images_, lanes_, limit_, wave_, groups_, splits_;
  HeadBuffers<P> head_;
  // Of all rows, or, those called hidden, of a wave's.
  float* stream_ = nullptr;
  Place* places_ = nullptr;
  A *lines_ = nullptr, *hidden_ = nullptr;
  P* qkv_ = nullptr;
  // For int8: rows before they are quantised, and behind that.
  float* attended_ = nullptr;
  P* activated_ = nullptr;
  int32_t *bytes_ = nullptr, *hidden_bytes_ = nullptr;
  RowRange *ranges_ = nullptr, *hidden_ranges_ = nullptr;
  // A lane's own.
  char* lane_memory_ = nullptr;
  A* sums_ = nullptr;
  float* row_ = nullptr;
};

template <class P>
void encode_between(const EncoderArgs& g, Copy* read, Copy* write) {
  const int64_t threads = thread_count(), alone = g.batch / threads * threads, rest = g.batch - alone;
  const Encoder<P> one(g, read, write, 1, 1), all(g, read, write, rest > 0 ? rest : 1, threads);
  const int64_t shared = one.shared_bytes(), lane = one.lane_bytes();
  const int64_t all_shared = rest ? all.shared_bytes() : 0, all_lane = rest ? all.lane_bytes() : 0;
  const Scratch solo(alone ? threads * (shared + lane) : 0), together(all_shared + threads * all_lane);
  for_each_unit(g.batch, all.steps(), [&](Team::Worker& worker, int64_t begin, int64_t end) {
    const bool single = worker.lanes() == 1 && begin < alone;
    Encoder<P> mine = single ? one : all;
    if (single) {
      char* const memory = solo.as<char>() + worker.lane() * (shared + lane);
      mine.place(memory, memory + shared);
    } else {
      mine.place(together.as<char>(), together.as<char>() + all_shared);
    }
    mine.run(worker, begin);
  });
}

// T is what x and y are stored as.
template <class T, class P>
void encode(const EncoderArgs& g) {
  encode_between<P>(g, copy<T, float>, copy<float, T>);
}
