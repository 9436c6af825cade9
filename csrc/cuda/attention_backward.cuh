#pragma once

#include "cuda/attention_tile.cuh"

namespace fastvit::cuda {

// With P = exp(scores - lse), dP = dout Vᵀ and delta = Σ dout out of a row: dS = P (dP - delta), dq = scale dS K,
// dk = scale dSᵀ q and dv = Pᵀ dout. One pass has queries of its own, goes over keys and makes dq; another has keys of
// its own, goes over queries and makes dk and dv. So every sum stays with one warp.

// A row's lse in units of log 2; of a row without keys no weight is left.
__device__ inline float shift_of_row(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

// What hides a weight also hides what its gradient holds, NaN included.
__device__ inline float score_gradient(float p, float dp, float delta) { return p == 0.0f ? 0.0f : p * (dp - delta); }

// 16 rows of a head in the warp's staging rows.
template <class T, int E>
__device__ void stage_rows(Tile<E> staging, const Heads& tensor, const Sequence& s, int first, int limit,
                           int head_dim) {
  __syncwarp();
  copy_rows(staging, head_of<T>(tensor, s), tensor.token, first, 16, limit, head_dim, threadIdx.x % 32, 32);
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
}

template <int E>
__device__ void load_squares(uint32_t (&words)[E / 16][4], Tile<E> tile) {
#pragma unroll
  for (int e = 0; e < E / 16; e++) load_square(words[e], tile, 16 * e);
}

// d += a b for 16 rows of b.
template <class T, int E>
__device__ void add_product(float (&d)[E / 8][4], const uint32_t (&a)[4], Tile<E> b) {
#pragma unroll
  for (int e = 0; e < E / 16; e++) {
    uint32_t words[4];
    load_square<true>(words, b, 16 * e);
    mma<T>(d[2 * e], a, words[0], words[1]);
    mma<T>(d[2 * e + 1], a, words[2], words[3]);
  }
}

// a bᵀ for 16 rows of b, as two halves of 8 columns.
template <class T, int E>
__device__ void product_with_rows(float (&d)[2][4], const uint32_t (&a)[E / 16][4], Tile<E> b) {
#pragma unroll
  for (int e = 0; e < E / 16; e++) {
    uint32_t words[4];
    load_rows_as_columns(words, b, 16 * e);
    mma<T>(d[0], a[e], words[0], words[1]);
    mma<T>(d[1], a[e], words[2], words[3]);
  }
}

// Two halves of 8 columns as the a of the next product.
template <class T>
__device__ void pack_halves(uint32_t (&a)[4], const float (&v)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = packed<T>(v[i / 2][i % 2 * 2], v[i / 2][i % 2 * 2 + 1]);
}

template <class T, int E>
__device__ void store_scaled(Tile<E> staging, float (&v)[E / 8][4], float scale, const Heads& tensor, const Sequence& s,
                             int first, int limit, int head_dim) {
#pragma unroll
  for (int j = 0; j < E / 8; j++)
#pragma unroll
    for (int c = 0; c < 4; c++) v[j][c] *= scale;
  store_rows<T>(staging, v, head_of<T>(tensor, s), tensor.token, first, limit, head_dim);
}

// dq of 16 queries, and their delta.
template <class T, int E, bool GENERAL>
struct QueryGradient {
  using Type = T;
  static constexpr int kHeadDim = E, kStaged = 16, kRegisters = E <= 64 ? 168 : 255;
  static constexpr bool kReadsStatistics = false, kGeneral = GENERAL;

  uint32_t q[E / 16][4], dout[E / 16][4];
  float dq[E / 8][4] = {};
  float shift[2], delta[2];

  __device__ static int own(const Sequence& s) { return s.queries; }
  __device__ static int other(const Sequence& s) { return s.keys; }
  __device__ static const Heads& first_of_pair(const Attention& g) { return g.k; }
  __device__ static const Heads& second_of_pair(const Attention& g) { return g.v; }

  __device__ void start(const Attention& g, const Sequence& s, Tile<E> staging, int first_row) {
    const int lane = threadIdx.x % 32;
    stage_rows<T>(staging, g.q, s, first_row, s.queries, g.head_dim);
    load_squares(q, staging);
    stage_rows<T>(staging, g.dout, s, first_row, s.queries, g.head_dim);
    load_squares(dout, staging);
    stage_rows<T>(staging, g.out, s, first_row, s.queries, g.head_dim);
    delta[0] = delta[1] = 0;
#pragma unroll
    for (int e = 0; e < E / 16; e++) {
      uint32_t out[4];
      load_square(out, staging, 16 * e);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 a = unpacked<T>(dout[e][i]), b = unpacked<T>(out[i]);
        delta[i % 2] += a.x * b.x + a.y * b.y;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      delta[half] = quad_sum(delta[half]);
      const int row = first_row + lane / 4 + 8 * half;
      shift[half] = row < s.queries ? shift_of_row(g.lse[s.statistics(g) + row]) : INFINITY;
      if (lane % 4 == 0 && row < s.queries) g.delta[s.statistics(g) + row] = delta[half];
    }
  }

  template <bool EDGE>
  __device__ void step(Tile<E> k, Tile<E> v, int key, int first_row, const Scores<T>& scores) {
    const int lane = threadIdx.x % 32;
    float p[2][4] = {}, dp[2][4] = {};
    product_with_rows<T>(p, q, k);
    product_with_rows<T>(dp, dout, v);
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int its_key = key + 8 * n + lane % 4 * 2 + c % 2, row = first_row + lane / 4 + c / 2 * 8;
        float score = GENERAL ? scores(p[n][c], row, its_key) : p[n][c] * scores.scale;
        if (EDGE && !GENERAL && its_key >= scores.keys) score = -INFINITY;
        dp[n][c] = score_gradient(exp2_fast(score - shift[c / 2]), dp[n][c], delta[c / 2]);
      }
    }
    uint32_t ds[4];
    pack_halves<T>(ds, dp);
    add_product<T>(dq, ds, k);
  }

  __device__ void go(Tile<E> k, Tile<E> v, const float2*, int first, int last, int first_row, const Scores<T>& scores) {
    int key = first;
    if (GENERAL && scores.causal) last = min(last, first_row + 16);
#pragma unroll 1
    for (; key + 16 <= last; key += 16, k = k.from(16), v = v.from(16)) step<false>(k, v, key, first_row, scores);
    if (key < last) step<true>(k, v, key, first_row, scores);
  }

  __device__ void finish(const Attention& g, const Sequence& s, Tile<E> staging, int first_row) {
    store_scaled<T>(staging, dq, g.scale, g.dq, s, first_row, s.queries, g.head_dim);
  }
};

// dk and dv of 16 keys.
template <class T, int E, bool GENERAL>
struct KeyGradient {
  using Type = T;
  static constexpr bool kReadsStatistics = true, kGeneral = GENERAL;
  // Wide heads leave no registers for keys and values: these are read from shared memory again and again.
  static constexpr bool kKept = E <= 96;
  static constexpr int kHeadDim = E, kStaged = kKept ? 16 : 32, kRegisters = E <= 48 ? 168 : 255;

  uint32_t k[E / 16][4], v[E / 16][4];
  float dk[E / 8][4] = {}, dv[E / 8][4] = {};
  Tile<E> own_rows;

  __device__ static int own(const Sequence& s) { return s.keys; }
  __device__ static int other(const Sequence& s) { return s.queries; }
  __device__ static const Heads& first_of_pair(const Attention& g) { return g.q; }
  __device__ static const Heads& second_of_pair(const Attention& g) { return g.dout; }

  __device__ void start(const Attention& g, const Sequence& s, Tile<E> staging, int first_key) {
    own_rows = staging;
    stage_rows<T>(staging, g.k, s, first_key, s.keys, g.head_dim);
    if (kKept) load_squares(k, staging);
    stage_rows<T>(kKept ? staging : staging.from(16), g.v, s, first_key, s.keys, g.head_dim);
    if (kKept) load_squares(v, staging);
  }

  __device__ void step(Tile<E> q, Tile<E> dout, const float2* statistics, int row, int first_key,
                       const Scores<T>& scores) {
    const int lane = threadIdx.x % 32;
    float p[2][4] = {}, ds[2][4] = {};
    if (!kKept) load_squares(k, own_rows);
    product_with_rows<T>(p, k, q);
    if (!kKept) load_squares(v, own_rows.from(16));
    product_with_rows<T>(ds, v, dout);
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int column = 8 * n + lane % 4 * 2 + c % 2;
        const float2 of_row = statistics[column];
        const float score =
            GENERAL ? scores(p[n][c], row + column, first_key + lane / 4 + c / 2 * 8) : p[n][c] * scores.scale;
        p[n][c] = exp2_fast(score - of_row.x);
        ds[n][c] = score_gradient(p[n][c], ds[n][c], of_row.y);
      }
    }
    uint32_t a[4];
    pack_halves<T>(a, p);
    add_product<T>(dv, a, dout);
    pack_halves<T>(a, ds);
    add_product<T>(dk, a, q);
  }

  __device__ void go(Tile<E> q, Tile<E> dout, const float2* statistics, int first, int last, int first_key,
                     const Scores<T>& scores) {
    const int skipped = GENERAL && scores.causal ? max(first_key - first, 0) : 0;
    q = q.from(skipped), dout = dout.from(skipped);
#pragma unroll 1
    for (int row = first + skipped; row < last; row += 16, q = q.from(16), dout = dout.from(16))
      step(q, dout, statistics + row - first, row, first_key, scores);
  }

  __device__ void finish(const Attention& g, const Sequence& s, Tile<E> staging, int first_key) {
    store_scaled<T>(staging, dk, g.scale, g.dk, s, first_key, s.keys, g.head_dim);
    store_scaled<T>(staging, dv, 1.0f, g.dv, s, first_key, s.keys, g.head_dim);
  }
};

// A warp has 16 rows at a time of its own; the others' pair lies in shared memory whole, or comes by in stages.
template <class Gradient>
__global__ void __launch_bounds__(kThreadsOf<Gradient::kRegisters>, 1)
    attention_backward_kernel(const __grid_constant__ Attention g, const __grid_constant__ AttentionPlan plan) {
  using T = typename Gradient::Type;
  constexpr int E = Gradient::kHeadDim;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int first_head = first_head_of_block(plan), first_unit = blockIdx.x * plan.units;
  const int heads = min(plan.heads, g.sequences * g.heads - first_head);
  const Tile<E> pairs{reinterpret_cast<uint4*>(shared_memory())};
  const Tile<E> all_staging = pairs.from((plan.streams ? 2 : plan.heads) * 2 * plan.stage_rows);
  const Tile<E> staging = all_staging.from(warp * Gradient::kStaged);
  auto* statistics = reinterpret_cast<float2*>(all_staging.from(warps * Gradient::kStaged).data);
  const auto request = [&](const Sequence& s, int stage, int buffer) {
    const int first = stage * plan.stage_rows, limit = Gradient::other(s);
    copy_pair<T>(pairs.from(buffer * 2 * plan.stage_rows), Gradient::first_of_pair(g), Gradient::second_of_pair(g), s,
                 first, plan.stage_rows, limit, g.head_dim);
    if constexpr (Gradient::kReadsStatistics) {
      for (int i = threadIdx.x; i < plan.stage_rows; i += blockDim.x) {
        const int64_t row = s.statistics(g) + first + i;
        float2 of_row{INFINITY, 0.0f};
        if (first + i < limit) of_row = {shift_of_row(g.lse[row]), g.delta[row]};
        statistics[buffer * plan.stage_rows + i] = of_row;
      }
    }
  };
  // Hidden keys, and queries that see none, must not show what they hold.
  const auto clean = [&](int buffer) {
    if (!Gradient::kGeneral || g.mask_kind != MaskKind::boolean) return;
    const Tile<E> pair = pairs.from(buffer * 2 * plan.stage_rows);
    clean_rows<T>(pair, plan.stage_rows, threadIdx.x, blockDim.x);
    if (!Gradient::kReadsStatistics)
      clean_rows<T>(pair.from(plan.stage_rows), plan.stage_rows, threadIdx.x, blockDim.x);
  };
  if (!plan.streams) {
    for (int i = 0; i < heads; i++) request(sequence_of(g, first_head + i), 0, i);
    commit_copies();
    wait_for_copies<0>();
    for (int i = 0; i < heads; i++) clean(i);
    __syncthreads();
  }
  for (int unit = warp; unit < heads * plan.units; unit += warps) {
    const Sequence s = sequence_of(g, first_head + unit / plan.units);
    const Scores<T> scores(g, s);
    const int first_own = (first_unit + unit % plan.units) * 16;
    const bool active = first_own < Gradient::own(s);
    Gradient gradient;
    if (plan.streams) request(s, 0, 0);
    commit_copies();
    if (active) gradient.start(g, s, staging, first_own);
    for (int stage = 0; stage < plan.stages; stage++) {
      const int buffer = plan.streams ? stage % 2 : unit / plan.units, first = stage * plan.stage_rows;
      if (plan.streams) {
        if (stage + 1 < plan.stages) request(s, stage + 1, (stage + 1) % 2);
        commit_copies();
        wait_for_copies<1>();
        clean(buffer);
        __syncthreads();
      }
      const Tile<E> pair = pairs.from(buffer * 2 * plan.stage_rows);
      if (active)
        gradient.go(pair, pair.from(plan.stage_rows), statistics + buffer * plan.stage_rows, first,
                    min(first + plan.stage_rows, Gradient::other(s)), first_own, scores);
      if (plan.streams) __syncthreads();
    }
    if (active) gradient.finish(g, s, staging, first_own);
  }
}

}  // namespace fastvit::cuda
