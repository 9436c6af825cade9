#pragma once

// Rows of heads in shared memory, and the parts of them that lanes hold for mma.

#include "cuda/attention.h"
#include "cuda/attention_plan.h"
#include "cuda/device.cuh"

namespace fastvit::cuda {

// Rows of E numbers in pieces of 16 bytes, E a multiple of 16. Eight rows at the same piece lie in eight different
// quarters of the banks: pieces trade places within a row, or rows are an odd number of pieces apart.
template <int E>
struct Tile {
  static constexpr int PIECES = E / 8;
  static constexpr bool SWIZZLED = PIECES % 8 == 0;
  static constexpr int PITCH = SWIZZLED ? PIECES : PIECES + 1;
  static constexpr int ROW_BYTES = 16 * PITCH;

  uint4* data;

  __device__ uint4* at(unsigned row, unsigned piece) const {
    return data + row * PITCH + (SWIZZLED ? piece ^ row % 8 : piece);
  }
  // The rows from one on, a multiple of 8.
  __device__ Tile from(int row) const { return {data + row * PITCH}; }
};

// load_matrices of addresses so many columns further, a multiple of 16: where pieces trade places, which they do within
// 128 bytes, by toggled bits.
template <bool TRANSPOSED = false, int E>
__device__ void load_at_column(uint32_t (&words)[4], Tile<E>, const uint4* first, int column) {
  if constexpr (Tile<E>::SWIZZLED) {
    load_matrices<TRANSPOSED>(words, first + column / 64 * 8, 2 * (column % 64));
  } else {
    load_matrices<TRANSPOSED>(words, first + column / 8);
  }
}

// The first 16 rows and 16 columns as mma's a; transposed, 16 rows and two times 8 columns as its b (words 0, 1 and 2,
// 3).
template <bool TRANSPOSED = false, int E>
__device__ void load_square(uint32_t (&words)[4], Tile<E> tile, int column) {
  const unsigned lane = threadIdx.x % 32;
  load_at_column<TRANSPOSED>(words, tile, tile.at(lane % 16, lane / 16), column);
}

// The first two times 8 rows and 16 columns as the b of a product with the rows' transpose (words 0, 1 and 2, 3).
template <int E>
__device__ void load_rows_as_columns(uint32_t (&words)[4], Tile<E> tile, int column) {
  const unsigned lane = threadIdx.x % 32;
  load_at_column(words, tile, tile.at(lane / 16 * 8 + lane % 8, lane / 8 % 2), column);
}

// Asks for rows first .. first + count of a head; those from `limit` on, and columns from head_dim on, are zero.
template <class T, int E>
__device__ void copy_rows(Tile<E> tile, const T* head, int64_t stride, int first, int count, int limit, int head_dim,
                          int thread, int threads) {
  for (int i = thread; i < count * Tile<E>::PIECES; i += threads) {
    const int row = i / Tile<E>::PIECES, piece = i % Tile<E>::PIECES;
    const bool there = first + row < limit && 8 * piece < head_dim;
    copy_async(tile.at(row, piece), there ? head + (first + row) * stride + 8 * piece : head, there);
  }
}

// For __launch_bounds__: the threads that have so many registers each when they fill a multiprocessor. Blocks are
// smaller.
template <int REGISTERS>
constexpr int kThreadsOf = 65536 / REGISTERS / 32 * 32;

// What copy_rows brought to this thread, without infinities and NaN; whether there were any.
template <class T, int E>
__device__ bool clean_rows(Tile<E> tile, int count, int thread, int threads) {
  bool spoiled = false;
  for (int i = thread; i < count * Tile<E>::PIECES; i += threads) {
    T* piece = reinterpret_cast<T*>(tile.at(i / Tile<E>::PIECES, i % Tile<E>::PIECES));
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (fabsf(to_float(piece[e])) < INFINITY) continue;
      from_float(0.0f, piece[e]);
      spoiled = true;
    }
  }
  return spoiled;
}

// mma's results of 16 rows to global memory, through the warp's rows in shared memory: 16 bytes at a time.
template <class T, int E>
__device__ void store_rows(Tile<E> staging, const float (&v)[E / 8][4], T* head, int64_t stride, int first, int limit,
                           int head_dim) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < E / 8; j++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      auto* words = reinterpret_cast<uint32_t*>(staging.at(lane / 4 + 8 * half, j));
      words[lane % 4] = packed<T>(v[j][2 * half], v[j][2 * half + 1]);
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * Tile<E>::PIECES; i += 32) {
    const int row = i / Tile<E>::PIECES, piece = i % Tile<E>::PIECES;
    if (first + row < limit && 8 * piece < head_dim)
      *reinterpret_cast<uint4*>(head + (first + row) * stride + 8 * piece) = *staging.at(row, piece);
  }
  __syncwarp();
}

// A head of a sequence: where it begins and how many rows it has, within the tensor whatever cu_seqlens holds.
struct Sequence {
  int index = 0, batch = 0, head = 0, first = 0, queries = 0, keys = 0;

  // Of the row statistics.
  __device__ int64_t statistics(const Attention& g) const {
    return (int64_t{batch} * g.heads + head) * g.queries + first;
  }
};

__device__ inline Sequence sequence_of(const Attention& g, int index) {
  Sequence s;
  s.index = index / g.heads;
  s.head = index % g.heads;
  s.batch = s.index;
  s.queries = g.queries;
  s.keys = g.keys;
  if (g.cu_seqlens) {
    s.first = min(max(g.cu_seqlens[s.index], 0), g.queries);
    s.queries = min(max(g.cu_seqlens[s.index + 1] - s.first, 0), min(g.queries - s.first, g.longest));
    s.keys = s.queries;
    s.batch = 0;
  }
  return s;
}

template <class T>
__device__ T* head_of(const Heads& tensor, const Sequence& s) {
  return static_cast<T*>(tensor.data) + s.batch * tensor.batch + s.head * tensor.head + s.first * tensor.token;
}

// The first of a block's heads; the last blocks of the grid may have none.
__device__ inline int64_t first_head_of_block(const AttentionPlan& plan) {
  return (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * plan.heads;
}

// Rows of two tensors by the whole block, one after the other.
template <class T, int E>
__device__ void copy_pair(Tile<E> pair, const Heads& a, const Heads& b, const Sequence& s, int first, int count,
                          int limit, int head_dim) {
  copy_rows<T>(pair, head_of<T>(a, s), a.token, first, count, limit, head_dim, threadIdx.x, blockDim.x);
  copy_rows<T>(pair.from(count), head_of<T>(b, s), b.token, first, count, limit, head_dim, threadIdx.x, blockDim.x);
}

// The score of a query and a key in units of log 2, from their product.
template <class T>
struct Scores {
  const void* mask;
  int64_t row_stride, key_stride;
  MaskKind kind;
  float scale;  // with log2 e
  bool causal;
  int queries, keys;

  __device__ Scores(const Attention& g, const Sequence& s)
      : row_stride(g.mask_strides[2]),
        key_stride(g.mask_strides[3]),
        kind(g.mask_kind),
        scale(g.scale * kLog2E),
        causal(g.causal),
        queries(s.queries),
        keys(s.keys) {
    const int64_t offset = s.index * g.mask_strides[0] + s.head * g.mask_strides[1];
    const int size = kind == MaskKind::boolean ? 1 : kind == MaskKind::additive ? sizeof(T) : 4;
    mask = static_cast<const char*>(g.mask) + (g.mask ? offset * size : 0);
  }

  __device__ bool visible(int row, int key) const {
    if (row >= queries || key >= keys || (causal && key > row)) return false;
    return kind != MaskKind::boolean || static_cast<const bool*>(mask)[row * row_stride + key * key_stride];
  }

  __device__ float operator()(float product, int row, int key) const {
    if (!visible(row, key)) return -INFINITY;
    const int64_t offset = row * row_stride + key * key_stride;
    float added = 0;
    if (kind == MaskKind::additive) added = to_float(static_cast<const T*>(mask)[offset]);
    if (kind == MaskKind::additive_float) added = static_cast<const float*>(mask)[offset];
    return product * scale + added * kLog2E;
  }
};

}  // namespace fastvit::cuda
