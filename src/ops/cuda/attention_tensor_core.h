#pragma once

// For .cu files: what the two directions of attention on tensor cores share. A block has kThreads threads;
// each of its warps computes rows of its own, 16 to a row tile, and everything else that a product reads
// comes by in blocks through shared memory, two of them in turn. E is bf16 or f16.

#include <limits>

#include "ops/cuda/attention_input.h"
#include "ops/cuda/tensor_core.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = kAttentionWarps * kWarp;
inline constexpr int64_t kElementBytes = 2;  // of E
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// Elements between rows of D channels in shared memory: so that 8 rows lie in different banks.
template <int D>
inline constexpr int kSharedStride = D + 8;

/// What a warp holds of kTiles * 16 rows by kColumns columns, as multiply_add has sums.
template <int kTiles, int kColumns>
using Sums = float[kTiles][kColumns / 8][4];

/// The same as the left side of a product.
template <int kTiles, int kColumns>
using Weights = uint32_t[kTiles][kColumns / 16][4];

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }

/// Where element i of Sums[tile][] lies among the warp's rows, and that of Sums[][n] among the columns.
__device__ inline int row_in_tiles(int tile, int i) { return tile * 16 + lane_of_warp() / 4 + i / 2 * 8; }
__device__ inline int column_in_sums(int n, int i) { return n * 8 + lane_of_warp() % 4 * 2 + i % 2; }

/// Begins to copy kRows rows from `first`, with zeros beyond the matrix. The whole block must call.
template <int D, int kRows, class E>
__device__ void copy_rows(const HeadRows<E>& rows, int first, E* to) {
  constexpr int kLanes = D <= 64 ? 8 : 16;  // that share a row
  constexpr int kAtOnce = kAttentionThreads / kLanes;
  const int channel = static_cast<int>(threadIdx.x) % kLanes * 8;
  const int row = static_cast<int>(threadIdx.x) / kLanes;
  if (channel >= D) return;
  const E* from = rows.data + (first + row) * rows.stride + channel;
  const int there = channel < rows.size ? rows.count - first - row : 0;
  to += row * kSharedStride<D> + channel;
#pragma unroll
  for (int i = 0; i < kRows; i += kAtOnce) {
    copy_async<16>(to + i * kSharedStride<D>, i < there ? from : rows.data, i < there);
    from += kAtOnce * rows.stride;
  }
}

/// Begins to copy kCount numbers of 4 bytes from `first`, zeros from `count` on.
template <int kCount, class Number>
__device__ void copy_numbers(const Number* from, int first, int count, Number* to) {
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kAttentionThreads) {
    const bool there = first + i < count;
    copy_async<4>(to + i, there ? from + first + i : from, there);
  }
}

/// products = the dot products of the warp's rows with kColumns rows, both of D channels in shared memory.
template <int D, int kTiles, int kColumns, class E>
__device__ __forceinline__ void multiply_rows(const E* rows, const E* columns,
                                              Sums<kTiles, kColumns>& products) {
  constexpr int kStride = kSharedStride<D>;
  const int lane = lane_of_warp();
  const E* row = rows + lane % 16 * kStride + lane / 16 * 8;
  const E* column = columns + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
  for (auto& tile : products) {
#pragma unroll
    for (auto& part : tile) {
#pragma unroll
      for (float& p : part) p = 0.0f;
    }
  }
#pragma unroll
  for (int channel = 0; channel < D; channel += 16) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_matrices(row + m * 16 * kStride + channel, a[m]);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      uint32_t b[4];
      load_matrices(column + n * 8 * kStride + channel, b);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply_add<E>(a[m], b[0], b[1], products[m][n]);
        multiply_add<E>(a[m], b[2], b[3], products[m][n + 1]);
      }
    }
  }
}

/// sums += weights times kColumns rows of D channels in shared memory.
template <int D, int kTiles, int kColumns, class E>
__device__ __forceinline__ void add_products(const Weights<kTiles, kColumns>& weights, const E* rows,
                                             Sums<kTiles, D>& sums) {
  constexpr int kStride = kSharedStride<D>;
  const int lane = lane_of_warp();
  const E* row = rows + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step) {
#pragma unroll
    for (int c = 0; c < D / 8; c += 2) {
      uint32_t b[4];
      load_matrices_transposed(row + step * 16 * kStride + c * 8, b);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        multiply_add<E>(weights[m][step], b[0], b[1], sums[m][c]);
        multiply_add<E>(weights[m][step], b[2], b[3], sums[m][c + 1]);
      }
    }
  }
}

/// Whether all of `columns` keys from `key` are seen by all queries from `first_query` on; where documents
/// are masked that is not looked into.
template <class H>
__device__ bool all_seen(const H& head, int first_query, int key, int columns) {
  return head.starts() == nullptr && key + columns <= head.keys_of(first_query).end;
}

/// Scores of rows of queries with columns of keys: minus infinity where the query does not attend to the key.
template <int kTiles, int kColumns, class H>
__device__ __forceinline__ void mask_queries(const H& head, int first_query, int key,
                                             Sums<kTiles, kColumns>& scores) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query + row_in_tiles(m, 2 * r);
      const Positions seen = query < head.queries() ? head.keys_of(query) : Positions{0, 0};
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          const int k = key + column_in_sums(n, i);
          if (k < seen.begin || k >= seen.end) scores[m][n][i] = kMinusInfinity;
        }
      }
    }
  }
}

/// weights = the numbers, each rounded once.
template <class E, int kTiles, int kColumns>
__device__ __forceinline__ void to_weights(const Sums<kTiles, kColumns>& numbers,
                                           Weights<kTiles, kColumns>& weights) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      weights[m][n / 2][n % 2 * 2] = pack_pair<E>(numbers[m][n][0], numbers[m][n][1]);
      weights[m][n / 2][n % 2 * 2 + 1] = pack_pair<E>(numbers[m][n][2], numbers[m][n][3]);
    }
  }
}

/// Which of elements index ... index + 3 of a sample dropout keeps, a bit for each; index is a multiple of 4.
template <class H>
__device__ uint32_t four_kept(const H& head, uint64_t index) {
  const auto words = head.dropout().stream.words(index / 4, head.dropout_sample());
  const uint32_t threshold = head.dropout().threshold;
  return uint32_t{words[0] >= threshold} | uint32_t{words[1] >= threshold} << 1 |
         uint32_t{words[2] >= threshold} << 2 | uint32_t{words[3] >= threshold} << 3;
}

/// Which of the four elements Sums[tile][n] dropout keeps, bit i for element i. `element_of(i)` is the number
/// of element i in the sample.
template <class H, class ElementOf>
__device__ uint32_t kept_one_by_one(const H& head, ElementOf&& element_of) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    float multiplier[1];
    head.dropout().template multipliers_of<1>(head.dropout_sample(), element_of(i), multiplier);
    kept |= uint32_t{multiplier[0] != 0.0f} << i;
  }
  return kept;
}

/// The same where rows are queries from `query` and columns are keys from `key`, a multiple of 8. One call of
/// the generator gives four neighbouring keys, which two lanes share: each calls it for one of their two
/// rows.
template <class H>
__device__ uint32_t kept_in_queries(const H& head, int query, int key) {
  const int lane = lane_of_warp();
  if (!head.drops_by_fours()) {
    return kept_one_by_one(
        head, [&](int i) { return head.element(query + lane / 4 + i / 2 * 8, key + lane % 4 * 2 + i % 2); });
  }
  const bool odd = lane % 2 != 0;
  const uint32_t mine =
      four_kept(head, head.element(query + lane / 4 + (odd ? 8 : 0), key + lane % 4 / 2 * 4));
  const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 1);
  const uint32_t upper_row = odd ? other : mine;
  const uint32_t lower_row = odd ? mine : other;
  return odd ? upper_row >> 2 | (lower_row & 12u) : (upper_row & 3u) | (lower_row & 3u) << 2;
}

/// The same where rows are keys from `key`, a multiple of 8, and columns are queries from `query`: four lanes
/// share four calls.
template <class H>
__device__ uint32_t kept_in_keys(const H& head, int key, int query) {
  const int lane = lane_of_warp();
  const int row = lane / 4;
  if (!head.drops_by_fours()) {
    return kept_one_by_one(
        head, [&](int i) { return head.element(query + lane % 4 * 2 + i % 2, key + row + i / 2 * 8); });
  }
  const int call = row % 4;
  const uint32_t mine =
      four_kept(head, head.element(query + lane % 4 * 2 + call % 2, key + row / 4 * 4 + call / 2 * 8));
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t keys = __shfl_sync(kAllLanes, mine, (lane & ~12) | i << 2);
    kept |= (keys >> row % 4 & 1u) << i;
  }
  return kept;
}

/// Bits of what dropout keeps of Sums: 4 n + i for element i of [][n].
__device__ inline bool is_kept(uint32_t kept, int n, int i) { return (kept >> (4 * n + i) & 1u) != 0; }

/// What dropout keeps of rows of queries and columns of keys, for each tile.
template <int kTiles, int kColumns, class H>
__device__ __forceinline__ void find_kept_in_queries(const H& head, int first_query, int key,
                                                     uint32_t (&kept)[kTiles]) {
  static_assert(kColumns <= 64);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    kept[m] = 0;
#pragma unroll 1
    for (int n = 0; n < kColumns / 8; ++n) {
      kept[m] |= kept_in_queries(head, first_query + m * 16, key + n * 8) << (4 * n);
    }
  }
}

/// The same of rows of keys and columns of queries.
template <int kTiles, int kColumns, class H>
__device__ __forceinline__ void find_kept_in_keys(const H& head, int first_key, int query,
                                                  uint32_t (&kept)[kTiles]) {
  static_assert(kColumns <= 64);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    kept[m] = 0;
#pragma unroll 1
    for (int n = 0; n < kColumns / 8; ++n) {
      kept[m] |= kept_in_keys(head, first_key + m * 16, query + n * 8) << (4 * n);
    }
  }
}

/// Writes the warp's rows below `count`, through `shared`, which only this warp uses, to rows of a head of
/// `size` channels that begin at `to`; `first` is the first of them.
template <int D, int kTiles, class E>
__device__ __forceinline__ void write_rows(const Sums<kTiles, D>& sums, E* shared, int first, int count,
                                           int size, E* to, int64_t stride) {
  __syncwarp();  // every lane has read what was there
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        store_pair(sums[m][n][i], sums[m][n][i + 1],
                   shared + row_in_tiles(m, i) * kSharedStride<D> + column_in_sums(n, i));
      }
    }
  }
  __syncwarp();
  constexpr int kPacks = D / 8;
  for (int i = lane_of_warp(); i < kTiles * 16 * kPacks; i += kWarp) {
    const int row = i / kPacks;
    const int channel = i % kPacks * 8;
    if (first + row >= count || channel >= size) continue;
    using Eight = Pack<E, 8>;
    *reinterpret_cast<Eight*>(to + (first + row) * stride + channel) =
        *reinterpret_cast<const Eight*>(shared + row * kSharedStride<D> + channel);
  }
}

/// Adds the warp's rows below `count` to rows of a head of `size` channels that begin at `to`; those there
/// are multiplied by `kept` before, two rows of each tile a thread.
template <int D, int kTiles>
__device__ __forceinline__ void add_rows(const Sums<kTiles, D>& sums, const float (&kept)[kTiles][2],
                                         int first, int count, int size, float* to, int64_t stride) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + row_in_tiles(m, i);
      if (row >= count) continue;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const int channel = column_in_sums(n, i);
        if (channel >= size) continue;
        float& sum = to[row * stride + channel];
        sum = sum * kept[m][i / 2] + sums[m][n][i];
      }
    }
  }
}

/// Gives the warp's rows below `count` to a result's, which begin at `at`: by way of `shared` where they are
/// written.
template <int D, int kTiles, class E>
__device__ __forceinline__ void give_rows(const Sums<kTiles, D>& sums, E* shared, int first, int count,
                                          int size, const ResultRows<E>& to, int64_t at) {
  if (to.added == nullptr) {
    write_rows<D, kTiles>(sums, shared, first, count, size, to.written + at, to.stride);
  } else {
    float kept[kTiles][2];
#pragma unroll
    for (auto& rows : kept) rows[0] = rows[1] = 1.0f;
    add_rows<D, kTiles>(sums, kept, first, count, size, to.added + at, to.stride);
  }
}

/// Calls body.operator()<D>() with the least number of channels that is compiled for and holds a head.
template <class Body>
void with_head_size(int64_t head_size, Body&& body) {
  if (head_size <= 64) return body.template operator()<64>();
  if (head_size <= 80) return body.template operator()<80>();
  if (head_size <= 96) return body.template operator()<96>();
  body.template operator()<128>();
}

}  // namespace normformer::ops::cuda
