#pragma once

#include "cuda/attention_tile.cuh"

namespace fastvit::cuda {

// What 16 M rows of queries have seen so far. A row's weights are relative to `top`, which follows the largest score
// only when that has outgrown it by kSlack: the result is the same, and most keys need no look at the other lanes'
// scores.
template <int E, int M>
struct Seen {
  float total[M][E / 8][4] = {};
  float top[M][2];
  float weight[M][2] = {};

  __device__ Seen() {
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;
  }
};

constexpr float kSlack = 8;

__device__ inline float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

// A row without keys yet has nothing to fade.
template <int E, int M>
__device__ void raise_tops(Seen<E, M>& seen, const float (&largest)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float top = fmaxf(seen.top[m][half], quad_max(largest[m][half]));
      const float fade = exp2_fast(seen.top[m][half] - shift_of(top));
      seen.top[m][half] = top;
      seen.weight[m][half] *= fade;
#pragma unroll
      for (int j = 0; j < E / 8; j++) {
        seen.total[m][j][2 * half] *= fade;
        seen.total[m][j][2 * half + 1] *= fade;
      }
    }
  }
}

// Joins the tiles' first 16 keys, which begin with `key`; 8 N of them are computed with. EDGE: some may be no keys.
// GENERAL: scores have a mask, or causality.
template <class T, int E, int M, int N, bool EDGE, bool GENERAL>
__device__ void attend(Seen<E, M>& seen, const uint32_t (&q)[M][E / 16][4], Tile<E> k, Tile<E> v, int key,
                       int first_row, const Scores<T>& scores) {
  const int lane = threadIdx.x % 32;
  float s[M][2][4] = {};
#pragma unroll
  for (int e = 0; e < E / 16; e++) {
    uint32_t words[4];
    load_rows_as_columns(words, k, 16 * e);
#pragma unroll
    for (int m = 0; m < M; m++) {
      mma<T>(s[m][0], q[m][e], words[0], words[1]);
      if (N == 2) mma<T>(s[m][1], q[m][e], words[2], words[3]);
    }
  }
  float largest[M][2];
  bool outgrown = false;
  const float scale = GENERAL ? 1.0f : scores.scale;
#pragma unroll
  for (int m = 0; m < M; m++) {
    largest[m][0] = largest[m][1] = -INFINITY;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int its_key = key + 8 * n + lane % 4 * 2 + c % 2;
        const int its_row = first_row + 16 * m + lane / 4 + c / 2 * 8;
        if (GENERAL) s[m][n][c] = scores(s[m][n][c], its_row, its_key);
        if (n >= N || (EDGE && !GENERAL && its_key >= scores.keys)) s[m][n][c] = -INFINITY;
        largest[m][c / 2] = fmaxf(largest[m][c / 2], s[m][n][c]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      largest[m][half] *= scale;
      outgrown |= largest[m][half] > seen.top[m][half] + kSlack;
    }
  }
  if (__any_sync(kAllLanes, outgrown)) raise_tops(seen, largest);
  uint32_t p[M][4];
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float shift = shift_of(seen.top[m][half]);
        const float low = exp2_fast(s[m][n][2 * half] * scale - shift);
        const float high = exp2_fast(s[m][n][2 * half + 1] * scale - shift);
        seen.weight[m][half] += low + high;
        p[m][2 * n + half] = packed<T>(low, high);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < E / 16; e++) {
    uint32_t words[4];
    load_square<true>(words, v, 16 * e);
#pragma unroll
    for (int m = 0; m < M; m++) {
      mma<T>(seen.total[m][2 * e], p[m], words[0], words[1]);
      mma<T>(seen.total[m][2 * e + 1], p[m], words[2], words[3]);
    }
  }
}

// Keys first .. last of a head, with which the tiles begin.
template <class T, int E, int M, bool GENERAL>
__device__ void attend_stage(Seen<E, M>& seen, const uint32_t (&q)[M][E / 16][4], Tile<E> k, Tile<E> v, int first,
                             int last, int first_row, const Scores<T>& scores) {
  int key = first;
  if (GENERAL && scores.causal) last = min(last, first_row + 16 * M);
#pragma unroll 1
  for (; key + 16 <= last; key += 16, k = k.from(16), v = v.from(16))
    attend<T, E, M, 2, false, GENERAL>(seen, q, k, v, key, first_row, scores);
  if (key + 8 < last) {
    attend<T, E, M, 2, true, GENERAL>(seen, q, k, v, key, first_row, scores);
  } else if (key < last) {
    attend<T, E, M, 1, true, GENERAL>(seen, q, k, v, key, first_row, scores);
  }
}

// Shows infinities and NaN of V, which clean_rows left out, to the queries that attend to them: hardly ever taken.
template <class T, int E>
__device__ void reveal(float (&out)[E / 8][4], const T* v, int64_t stride, int head_dim, int first_row,
                       const Scores<T>& scores) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < E / 8; j++) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int column = 8 * j + lane % 4 * 2 + c % 2, row = first_row + lane / 4 + c / 2 * 8;
      for (int key = 0; key < scores.keys && column < head_dim; key++) {
        const float value = to_float(v[key * stride + column]);
        if (!(fabsf(value) < INFINITY) && scores.visible(row, key)) out[j][c] += value;
      }
    }
  }
}

// The last of a row's work: what its keys gave, divided by their weights.
template <class T, int E, int M>
__device__ void finish(Seen<E, M>& seen, const Attention& g, const Sequence& sequence, int first_row) {
  const int lane = threadIdx.x % 32;
  float* lse = g.lse + sequence.statistics(g);
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float weight = quad_sum(seen.weight[m][half]);
      const float top = seen.top[m][half];
      const float factor = top == -INFINITY && weight == 0.0f ? 0.0f : 1.0f / weight;
#pragma unroll
      for (int j = 0; j < E / 8; j++) {
        seen.total[m][j][2 * half] *= factor;
        seen.total[m][j][2 * half + 1] *= factor;
      }
      const int row = first_row + 16 * m + lane / 4 + 8 * half;
      if (g.lse && lane % 4 == 0 && row < sequence.queries) lse[row] = (top + log2f(weight)) / kLog2E;
    }
  }
}

template <class T, int E, int M>
__device__ void load_queries(uint32_t (&q)[M][E / 16][4], Tile<E> staging) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int e = 0; e < E / 16; e++) load_square(q[m][e], staging.from(16 * m), 16 * e);
}

// 16 M queries of a head from `first_row` on, which are in the warp's staging rows.
template <class T, int E, int M>
__device__ void attend_unit(const Attention& g, const Sequence& sequence, Tile<E> k, Tile<E> v, Tile<E> staging,
                            int first_row) {
  uint32_t q[M][E / 16][4];
  load_queries<T>(q, staging);
  Seen<E, M> seen;
  attend_stage<T, E, M, false>(seen, q, k, v, 0, sequence.keys, first_row, Scores<T>(g, sequence));
  finish<T>(seen, g, sequence, first_row);
#pragma unroll
  for (int m = 0; m < M; m++)
    store_rows<T>(staging, seen.total[m], head_of<T>(g.out, sequence), g.out.token, first_row + 16 * m,
                  sequence.queries, g.head_dim);
}

// Of attention_kernel, whose blocks are small: three of four warps on a multiprocessor.
template <int E>
constexpr int kOneCopyRegisters = E <= 64 ? 168 : 255;

// All keys and values of a block's heads in shared memory. A warp takes 16 M queries at a time, the last ones by 16.
template <class T, int E, int M>
__global__ void __launch_bounds__(kThreadsOf<kOneCopyRegisters<E>>, 1)
    attention_kernel(const __grid_constant__ Attention g, const __grid_constant__ AttentionPlan plan) {
  const int warp = threadIdx.x / 32;
  const Tile<E> pairs{reinterpret_cast<uint4*>(shared_memory())};
  const Tile<E> staging = pairs.from(plan.heads * 2 * plan.stage_rows + warp * 16 * M);
  const int first_head = first_head_of_block(plan), first_unit = blockIdx.x * plan.units;
  const int heads = min(plan.heads, g.sequences * g.heads - first_head), units = heads * plan.units;
  const auto request_queries = [&](int unit) {
    if (unit >= units) return;
    const Sequence sequence = sequence_of(g, first_head + unit / plan.units);
    copy_rows(staging, head_of<T>(g.q, sequence), g.q.token, (first_unit + unit % plan.units) * 16 * M, 16 * M,
              sequence.queries, g.head_dim, threadIdx.x % 32, 32);
  };
  request_queries(warp);
  for (int i = 0; i < heads; i++) {
    const Sequence sequence = sequence_of(g, first_head + i);
    copy_pair<T>(pairs.from(2 * i * plan.stage_rows), g.k, g.v, sequence, 0, plan.stage_rows, sequence.keys,
                 g.head_dim);
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  for (int unit = warp; unit < units; unit += blockDim.x / 32) {
    const Sequence sequence = sequence_of(g, first_head + unit / plan.units);
    const Tile<E> k = pairs.from(unit / plan.units * 2 * plan.stage_rows);
    const int first_row = (first_unit + unit % plan.units) * 16 * M, left = sequence.queries - first_row;
    if (unit != warp) {  // the first ones came with the keys
      request_queries(unit);
      commit_copies();
      wait_for_copies<0>();
      __syncwarp();
    }
    if (M > 1 && left > 0 && left <= 16) {
      attend_unit<T, E, 1>(g, sequence, k, k.from(plan.stage_rows), staging, first_row);
    } else if (left > 0) {
      attend_unit<T, E, M>(g, sequence, k, k.from(plan.stage_rows), staging, first_row);
    }
  }
}

// Keys and values come by in stages; a warp takes 16 M queries.
template <class T, int E, int M, bool GENERAL>
__global__ void __launch_bounds__(kThreadsOf<255>, 1)
    attention_streaming_kernel(const __grid_constant__ Attention g, const __grid_constant__ AttentionPlan plan) {
  const int warp = threadIdx.x / 32;
  const Tile<E> pairs{reinterpret_cast<uint4*>(shared_memory())};
  const Tile<E> staging = pairs.from(4 * plan.stage_rows + warp * 16 * M);
  const int head = first_head_of_block(plan);
  if (head >= g.sequences * g.heads) return;
  const Sequence sequence = sequence_of(g, head);
  const Scores<T> scores(g, sequence);
  const int first_row = (blockIdx.x * plan.units + warp) * 16 * M;
  const auto request = [&](int stage) {
    copy_pair<T>(pairs.from(stage % 2 * 2 * plan.stage_rows), g.k, g.v, sequence, stage * plan.stage_rows,
                 plan.stage_rows, sequence.keys, g.head_dim);
  };
  copy_rows(staging, head_of<T>(g.q, sequence), g.q.token, first_row, 16 * M, sequence.queries, g.head_dim,
            threadIdx.x % 32, 32);
  request(0);
  commit_copies();
  uint32_t q[M][E / 16][4];
  Seen<E, M> seen;
  bool spoiled = false;
  for (int stage = 0; stage < plan.stages; stage++) {
    const Tile<E> k = pairs.from(stage % 2 * 2 * plan.stage_rows), v = k.from(plan.stage_rows);
    if (stage + 1 < plan.stages) request(stage + 1);
    commit_copies();
    wait_for_copies<1>();
    if (GENERAL && g.mask_kind == MaskKind::boolean)
      spoiled |= clean_rows<T>(v, plan.stage_rows, threadIdx.x, blockDim.x);
    spoiled = __syncthreads_or(spoiled) != 0;
    if (stage == 0) load_queries<T>(q, staging);
    const int first = stage * plan.stage_rows;
    if (first_row < sequence.queries)
      attend_stage<T, E, M, GENERAL>(seen, q, k, v, first, min(first + plan.stage_rows, sequence.keys), first_row,
                                     scores);
    __syncthreads();
  }
  finish<T>(seen, g, sequence, first_row);
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int row = first_row + 16 * m;
    if (GENERAL && spoiled) reveal<T, E>(seen.total[m], head_of<T>(g.v, sequence), g.v.token, g.head_dim, row, scores);
    store_rows<T>(staging, seen.total[m], head_of<T>(g.out, sequence), g.out.token, row, sequence.queries, g.head_dim);
  }
}

}  // namespace fastvit::cuda
