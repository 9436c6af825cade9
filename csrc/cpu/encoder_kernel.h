#include "cpu/simd.h"
#include "cpu/math.h"
#include "cpu/micro.h"
#include "cpu/normalise.h"
#include "cpu/product.h"
#include "cpu/attention_head.h"

// Whole encoder blocks over a few images, by one thread alone or by all of them. Rows go through a block in groups that
// fit into a core's cache; only attention needs every row of its image.
template <class T, class P>
class Encoder {
  using C = compute_t<P>;
  using A = unit_t<C>;
  static constexpr int64_t kLanesA = kLanes<A>;

 public:
  Encoder(const EncoderArgs<T>& args, int64_t images, int64_t lanes)
      : g_(args),
        rows_(images * args.tokens),
        images_(images),
        lanes_(lanes),
        limit_(group_rows<C>(args.hidden, 2.4)),
        wave_(rows_ < lanes * 2 * kTileRows ? 1 : lanes),
        groups_(wave_ * ((rows_ + wave_ * limit_ - 1) / (wave_ * limit_))),
        head_(args.tokens, args.width / args.heads) {
    splits_ = images * args.heads % lanes == 0 ? 1 : (4 * lanes + images * args.heads - 1) / (images * args.heads);
    const int64_t tiles = Tiles(args.tokens).count;
    splits_ = splits_ < tiles ? splits_ : tiles;
  }

  int64_t steps() const { return 2 + g_.depth * (1 + 6 * groups_ / wave_); }
  int64_t group_size() const { return (rows_ + groups_ - 1) / groups_; }

  // Bytes that the lanes share, and that each has for itself.
  int64_t shared_bytes() const {
    return aligned(rows_ * g_.width * sizeof(float)) + aligned(rows_ * 2 * sizeof(int64_t)) +
           aligned(rows_ * row_units<C>(g_.width) * sizeof(A)) + aligned(rows_ * 3 * g_.width * sizeof(P)) +
           aligned(wave_ * group_size() * row_units<C>(g_.hidden) * sizeof(A));
  }
  int64_t lane_bytes() const {
    return aligned(sums_size<C>(group_size()) * sizeof(A)) + aligned(head_.size() * sizeof(A));
  }

  void place(char* shared, char* lanes) {
    const auto take = [](char*& p, int64_t bytes) { return std::exchange(p, p + aligned(bytes)); };
    stream_ = reinterpret_cast<float*>(take(shared, rows_ * g_.width * sizeof(float)));
    places_ = reinterpret_cast<int64_t*>(take(shared, rows_ * 2 * sizeof(int64_t)));
    lines_ = reinterpret_cast<A*>(take(shared, rows_ * row_units<C>(g_.width) * sizeof(A)));
    qkv_ = reinterpret_cast<P*>(take(shared, rows_ * 3 * g_.width * sizeof(P)));
    hidden_ = reinterpret_cast<A*>(shared);
    lane_memory_ = lanes;
  }

  void run(Team::Worker& worker, int64_t image) {
    const int64_t count = rows_ * g_.width, first = image * g_.tokens * g_.width;
    A* const sums = reinterpret_cast<A*>(lane_memory_ + (lanes_ > 1 ? worker.lane() * lane_bytes() : 0));
    HeadBuffers<P> head = head_;
    head.place(sums + aligned(sums_size<C>(group_size()) * sizeof(A)) / sizeof(A));
    worker.each(groups_, [&](int64_t group) {
      const int64_t begin = begin_of(group), end = begin_of(group + 1);
      const Tiles tiles(end - begin);
      for (int64_t i = begin * g_.width; i < end * g_.width; i += kLanes<float>)
        store(stream_ + i, load(g_.x + first + i, end * g_.width - i), end * g_.width - i);
      for (int64_t t = 0; t < tiles.count; t++)
        for (int64_t i = 0; i < tiles.height(t); i++) {
          places_[2 * (begin + tiles.begin(t) + i)] = (begin + tiles.begin(t)) * row_units<C>(g_.width) + i * kLanesA;
          places_[2 * (begin + tiles.begin(t) + i) + 1] = tiles.height(t) * kLanesA;
        }
    });
    for (int64_t b = 0; b < g_.depth; b++) {
      const BlockArgs& block = g_.blocks[b];
      for (int64_t wave = 0; wave < groups_; wave += wave_) {
        normalise(worker, wave, block.norm1_weight, block.norm1_bias, block.norm1_eps);
        project_qkv(worker, wave, block.qkv, sums);
      }
      attend_heads(worker, head);
      for (int64_t wave = 0; wave < groups_; wave += wave_) {
        add_product(worker, wave, block.proj, lines_, false, sums);
        normalise(worker, wave, block.norm2_weight, block.norm2_bias, block.norm2_eps);
        activate_hidden(worker, wave, block.fc1, sums);
        add_product(worker, wave, block.fc2, hidden_, true, sums);
      }
    }
    worker.each(groups_, [&](int64_t group) {
      for (int64_t i = begin_of(group) * g_.width; i < begin_of(group + 1) * g_.width; i += kLanes<float>)
        store(g_.y + first + i, load(stream_ + i), count - i);
    });
  }

 private:
  // A vector of n numbers from `first` on.
  static Vec<A> load_at(const float* p, int64_t first, int64_t n) {
    return first < n ? load(p + first, n - first) : Vec<A>{};
  }
  static int64_t aligned(int64_t bytes) { return (bytes + 127) / 64 * 64; }
  int64_t begin_of(int64_t group) const { return rows_ * group / groups_; }
  Tiles tiles_of(int64_t group) const { return Tiles(begin_of(group + 1) - begin_of(group)); }

  void normalise(Team::Worker& worker, int64_t wave, const float* weight, const float* bias, double eps) {
    const int64_t begin = begin_of(wave), end = begin_of(wave + wave_);
    constexpr int64_t kRows = 4;
    worker.each((end - begin + kRows - 1) / kRows, [&](int64_t item) {
      for (int64_t row = begin + item * kRows; row < end && row < begin + (item + 1) * kRows; row++) {
        const Normaliser<float> normal(stream_ + row * g_.width, g_.width, eps, weight, bias);
        put_row<C>(lines_ + places_[2 * row], places_[2 * row + 1], g_.width, [&](int64_t i) { return normal(i); });
      }
    });
  }

  // f(group, tiles, tile, column, sums, bias) for every tile of a wave and every panel of a weight.
  template <class F>
  void multiply(Team::Worker& worker, int64_t wave, const LinearArgs& linear, const A* lines, bool by_wave, A* sums,
                const F& f) {
    const PackedWeight& w = linear.weight;
    const int64_t panels = panels_of<C>(w.n), size = units_of<C>(w.k) * kPanel<C>;
    worker.each(wave_ * panels, [&](int64_t item) {
      const int64_t group = wave + item / panels, p = item % panels;
      const Tiles tiles = tiles_of(group);
      const A* mine = lines + (by_wave ? item / panels * group_size() : begin_of(group)) * row_units<C>(w.k);
      Vec<A> bias[kPanelVectors] = {};
      for (int j = 0; j < kPanelVectors && linear.bias; j++)
        bias[j] = load_at(linear.bias, p * kPanel<C> + j * kLanesA, w.n);
      multiply_panel(Lines<C>{mine, tiles, w.k}, static_cast<const A*>(w.panels) + p * size, p * kPanel<C>, w.n, sums,
                     [&](int64_t t, int64_t column, const A* values) { f(group, tiles, t, column, values, bias); });
    });
  }

  void project_qkv(Team::Worker& worker, int64_t wave, const LinearArgs& linear, A* sums) {
    const int64_t n = linear.weight.n;
    multiply(worker, wave, linear, lines_, false, sums,
             [&](int64_t group, const Tiles& tiles, int64_t t, int64_t column, const A* values, const Vec<A>* bias) {
               P* out = qkv_ + (begin_of(group) + tiles.begin(t)) * n + column;
               for (int64_t i = tiles.height(t); i > 0; i--, out += n, values += kPanel<C>)
                 for (int j = 0; j < kPanelVectors && column + j * kLanesA < n; j++)
                   store(out + j * kLanesA, load(values + j * kLanesA) + bias[j], n - column - j * kLanesA);
             });
  }

  void attend_heads(Team::Worker& worker, HeadBuffers<P>& buffers) {
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
      if (pair != packed) pack_head(a, buffers, image, h);
      packed = pair;
      for (int64_t t = tiles.count * split / splits_; t < tiles.count * (split + 1) / splits_; t++)
        attend(a, buffers, image, h, tiles.begin(t), tiles.height(t), [&](int64_t query, int64_t e, Vec<A> v) {
          const int64_t* place = places_ + 2 * (image * g_.tokens + query);
          put_run<C>(lines_ + place[0], place[1], h * head_dim + e, head_dim - e, v);
        });
    });
  }

  void activate_hidden(Team::Worker& worker, int64_t wave, const LinearArgs& linear, A* sums) {
    const Activation activation = g_.activation;
    const int64_t n = linear.weight.n;
    multiply(worker, wave, linear, lines_, false, sums,
             [&](int64_t group, const Tiles& tiles, int64_t t, int64_t column, const A* values, const Vec<A>* bias) {
               A* const lines = hidden_ + (group - wave) * group_size() * row_units<C>(n);
               put_panel<C>(lines, tiles, t, column, n, [&](int64_t i, Vec<A>* v) {
                 for (int j = 0; j < kPanelVectors; j++)
                   v[j] = Rounded<C>::activate(load(values + i * kPanel<C> + j * kLanesA) + bias[j], activation);
               });
             });
  }

  void add_product(Team::Worker& worker, int64_t wave, const LinearArgs& linear, const A* lines, bool by_wave,
                   A* sums) {
    const int64_t n = linear.weight.n;
    multiply(worker, wave, linear, lines, by_wave, sums,
             [&](int64_t group, const Tiles& tiles, int64_t t, int64_t column, const A* values, const Vec<A>* bias) {
               float* out = stream_ + (begin_of(group) + tiles.begin(t)) * g_.width + column;
               Vec<A> scale[kPanelVectors];
               for (int j = 0; j < kPanelVectors; j++)
                 scale[j] = linear.layer_scale ? load_at(linear.layer_scale, column + j * kLanesA, n) : Vec<A>{} + 1.0f;
               for (int64_t i = tiles.height(t); i > 0; i--, out += g_.width, values += kPanel<C>)
                 for (int j = 0; j < kPanelVectors && column + j * kLanesA < n; j++) {
                   const int64_t left = n - column - j * kLanesA;
                   const Vec<A> branch = (load(values + j * kLanesA) + bias[j]) * scale[j];
                   store(out + j * kLanesA, branch + load(out + j * kLanesA, left), left);
                 }
             });
  }

  const EncoderArgs<T>& g_;
  int64_t rows_, images_, lanes_, limit_, wave_, groups_, splits_;
  HeadBuffers<P> head_;
  float* stream_ = nullptr;
  int64_t* places_ = nullptr;  // of each row among the lines: where it begins, and the step to its next line
  A* lines_ = nullptr;
  P* qkv_ = nullptr;
  A* hidden_ = nullptr;
  char* lane_memory_ = nullptr;
};

template <class T, class P>
void encode(const EncoderArgs<T>& g) {
  const int64_t threads = thread_count(), alone = g.batch / threads * threads, rest = g.batch - alone;
  const Encoder<T, P> one(g, 1, 1), all(g, rest > 0 ? rest : 1, threads);
  const int64_t shared = one.shared_bytes(), lane = one.lane_bytes();
  const int64_t all_shared = rest ? all.shared_bytes() : 0, all_lane = rest ? all.lane_bytes() : 0;
  const Scratch solo(alone ? threads * (shared + lane) : 0), together(all_shared + threads * all_lane);
  for_each_unit(g.batch, all.steps(), [&](Team::Worker& worker, int64_t begin, int64_t end) {
    const bool single = worker.lanes() == 1 && begin < alone;
    Encoder<T, P> mine = single ? one : all;
    if (single) {
      char* const memory = solo.as<char>() + worker.lane() * (shared + lane);
      mine.place(memory, memory + shared);
    } else {
      mine.place(together.as<char>(), together.as<char>() + all_shared);
    }
    mine.run(worker, begin);
  });
}
