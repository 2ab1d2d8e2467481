#pragma once

// For .cu files: kernels that go through the rows of a matrix, made from an operation on N neighbouring
// elements of a row.
//
// An operation is a struct that kernels take by value. All have
//   A                           what is computed in
//   kN                          N; rows are as many whole groups of N
//   Elements load(r, c)         what is read of row r's elements c ... c + N - 1
// and by the kernel:
//   Columns columns(c)          what is needed of columns c ... c + N - 1, the same in every row
//   Row row(r)                  what is needed of row r, the same in every column
//   terms(columns, elements, of_row, r, c, sums)
//                               adds the elements' terms to the row's sums A[2]
//   put(r, sums)                takes a row's sums; called by one thread
//   take(of_row, sums)          puts a row's sums into what is needed of it
//   finish(columns, elements, of_row, r, c, sums)
//                               writes the elements' results and adds their terms to the sums of columns,
//                               Sums<A, kColumnSums, N>
// What finish() writes may lie where load() read the same elements.

#include <algorithm>
#include <cmath>

#include "normformer/tensor/context.h"
#include "normformer/tensor/dispatch.h"

#include "ops/cuda/dropout_mask.h"
#include "ops/row_blocks.h"
#include "tensor/cuda/kernel.h"
#include "tensor/cuda/launch.h"

namespace normformer::ops::cuda {

using namespace normformer::cuda;

/// N elements in one access; the address is aligned to as many.
template <int N, class T>
__device__ Pack<T, N> pack_at(const T* from, int64_t at) {
  return *reinterpret_cast<const Pack<T, N>*>(from + at);
}

/// The same, or N times `otherwise` where there is no memory.
template <int N, class T>
__device__ Pack<T, N> pack_or(const T* from, int64_t at, double otherwise) {
  if (from != nullptr) return pack_at<N>(from, at);
  Pack<T, N> made;
#pragma unroll
  for (T& value : made.values) value = narrow<T>(static_cast<Accumulator<T>>(otherwise));
  return made;
}

/// Calls body.operator()<N>() with the N that an access of 16 bytes holds of T, or with 1.
template <class T, class Body>
void with_packs(bool packs, Body&& body) {
  if (packs) {
    body.template operator()<kPack<T>>();
  } else {
    body.template operator()<1>();
  }
}

/// A tensor's first element; null where it is undefined.
template <class T>
T* data_or_null(const Tensor& tensor) {
  return tensor ? tensor.data<T>() : nullptr;
}

/// Bit i: whether dropout keeps element `column + i` of a local row; all N are kept where there is no
/// dropout.
template <int N, class A>
__device__ uint32_t kept_bits(const DropoutMask<A>& mask, int64_t row, int64_t column) {
  if (!mask.active) return ~0u;
  // Rows are fewer than 2^31, and a division of 32 bits takes a fraction of the instructions.
  const auto rows_per_sample = static_cast<uint32_t>(std::min<int64_t>(mask.rows_per_sample, INT32_MAX));
  const auto whole_row = static_cast<uint32_t>(mask.first_row + row);
  const uint32_t samples = whole_row / rows_per_sample;
  const int64_t token = mask.token_of(whole_row - samples * rows_per_sample);
  const auto sample = static_cast<uint64_t>(mask.first_sample + samples);
  const auto first = static_cast<uint64_t>(token * mask.row_elements + mask.first_column + column);
  const int before = static_cast<int>(first % 4);
  uint32_t bits = 0;
  // One call of the generator after the other: side by side they would take the registers of everything else.
#pragma unroll 1
  for (int i = 0; i < before + N; i += 4) {
    const auto words = mask.stream.words((first + static_cast<uint64_t>(i)) / 4, sample);
    const uint32_t four = (words[0] >= mask.threshold ? 1u : 0u) | (words[1] >= mask.threshold ? 2u : 0u) |
                          (words[2] >= mask.threshold ? 4u : 0u) | (words[3] >= mask.threshold ? 8u : 0u);
    bits |= four << i;
  }
  return bits >> before;
}

/// What element i is multiplied by.
template <class A>
__device__ A multiplier(const DropoutMask<A>& mask, uint32_t kept, int i) {
  return (kept >> i & 1u) != 0 ? mask.kept : A(0);
}

/// 1 / n, rounded once. A product with it takes a kernel a fraction of a division's instructions.
template <class A>
A of_each(int64_t n) {
  return static_cast<A>(1.0 / static_cast<double>(n));
}

/// Scales of groups ("heads") of `size` channels; all 1 where `scales` is null.
template <class T>
struct Heads {
  const T* scales;
  int64_t size;

  Heads(const Tensor& tensor, int64_t columns)
      : scales(data_or_null<T>(tensor)), size(tensor ? columns / tensor.numel() : columns) {}

  /// Whether N neighbours from a multiple of N always have one scale.
  bool hold_packs_of(int n) const { return scales == nullptr || size % n == 0; }

  __device__ Accumulator<T> scale_of(int64_t column) const {
    return scales == nullptr ? Accumulator<T>(1) : widen(scales[column / size]);
  }
};

/// A block's threads as teams, each of whole warps, that hold a row each.
class Team {
 public:
  __device__ explicit Team(int team_threads)
      : threads(team_threads),
        index(static_cast<int>(threadIdx.x) / team_threads),
        member(static_cast<int>(threadIdx.x) % team_threads) {}

  int threads;  ///< of a team
  int index;    ///< of this thread's team in the block
  int member;   ///< this thread's number in its team

  __device__ int count() const { return static_cast<int>(blockDim.x) / threads; }

  /// The sums over the team's threads, the same bits on every thread: lanes first, then warps in order. Every
  /// thread of the block must call.
  template <int S, class A>
  __device__ void sum(A (&values)[S]) {
#pragma unroll
    for (A& value : values) value = warp_sum(value);
    if (threads == kWarp) return;
    // Two buffers in turn: who writes the next one may be ahead of who still reads this one.
    __shared__ A sums[2][S][kWarp];
    turn_ = 1 - turn_;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    if (static_cast<int>(threadIdx.x) % kWarp == 0) {
#pragma unroll
      for (int s = 0; s < S; ++s) sums[turn_][s][warp] = values[s];
    }
    __syncthreads();
    const int warps = threads / kWarp;
    const int first = index * warps;
#pragma unroll
    for (int s = 0; s < S; ++s) {
      values[s] = sums[turn_][s][first];
      for (int w = 1; w < warps; ++w) values[s] += sums[turn_][s][first + w];
    }
  }

 private:
  int turn_ = 0;
};

/// The sums of S quantities over rows, for N columns.
template <class A, int S, int N>
using Sums = A[S > 0 ? S : 1][N];

/// Where blocks put their sums of columns: sum s of block b's column c at data[b * stride + first[s] + c]; a
/// negative first[s] means nowhere.
template <class A, int S>
struct Partials {
  A* data = nullptr;
  int64_t stride = 0;
  int64_t first[S > 0 ? S : 1] = {};
};

/// Sum s of a matrix of `columns` at s * columns of `tensor` [blocks, S * columns].
template <class A, int S>
Partials<A, S> partials_in(const Tensor& tensor, int64_t columns) {
  Partials<A, S> made{.data = tensor.data<A>(), .stride = tensor.dim(1)};
  for (int s = 0; s < S; ++s) made.first[s] = s * columns;
  return made;
}

/// Writes a block's sums: those of its groups of `threads` threads, thread by thread, in the order of groups.
/// Takes N * blockDim.x elements of dynamic shared memory. `used`: whether this thread has columns. Every
/// thread must call.
template <int S, int N, class A>
__device__ void put_column_sums(const A (&sums)[S][N], int groups, int threads, bool used, int64_t column,
                                const Partials<A, S>& to) {
  A* shared = dynamic_shared<A>();
  const int thread = static_cast<int>(threadIdx.x);
  const int all = static_cast<int>(blockDim.x);
#pragma unroll
  for (int s = 0; s < S; ++s) {
    if (to.first[s] < 0) continue;
    __syncthreads();  // what was there has been read
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i * all + thread] = sums[s][i];
    __syncthreads();
    if (!used || thread >= threads) continue;
    A totals[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      totals[i] = shared[i * all + thread];
      for (int g = 1; g < groups; ++g) totals[i] += shared[i * all + g * threads + thread];
    }
    store_pack<N>(totals, to.data + blockIdx.x * to.stride + to.first[s] + column);
  }
}

/// Threads of a block of tiles_kernel.
template <class Op>
inline constexpr int kTileThreads = Op::kColumnSums == 0 ? 256 : 384;

/// Blocks that a multiprocessor runs at once: as many as registers allow.
template <class Op>
inline constexpr int kTileBlocks = Op::kColumnSums == 0   ? 4
                                   : Op::kColumnSums <= 3 ? 2
                                                          : 1;

/// How columns are cut into tiles: `width` groups of N elements each, every thread's the same in all rows
/// that it takes; `lanes` rows at a time. A block takes `passes` tiles one after the other.
struct Tiles {
  int width = 1;
  int lanes = 1;
  int passes = 1;
  int64_t blocks = 1;  ///< next to each other

  /// `threads`: of a block; `together`: blocks next to each other where there are as many row blocks as can
  /// be.
  Tiles(const RowBlocks& rows, int64_t packs, int threads, int together) {
    constexpr int64_t kMostWidth = 128;     // then the other threads of the block take other rows
    constexpr int64_t kLeastWidth = kWarp;  // narrower ones would read less than memory gives at once
    constexpr int64_t kMostRowBlocks = 128;
    blocks = std::clamp(together * kMostRowBlocks / rows.count, int64_t{1}, ceil_div(packs, kLeastWidth));
    passes = static_cast<int>(ceil_div(packs, blocks * kMostWidth));
    width = static_cast<int>(ceil_div(packs, blocks * passes));
    lanes = threads / width;
  }
};

/// finish() of every element. Block x takes row block x, block y `passes` tiles.
template <class Op>
__global__ void __launch_bounds__(kTileThreads<Op>, kTileBlocks<Op>)
    tiles_kernel(Op op, uint32_t rows, uint32_t rows_per_block, int64_t packs, Tiles tiles,
                 Partials<typename Op::A, Op::kColumnSums> to) {
  constexpr int kN = Op::kN;
  const int lane = static_cast<int>(threadIdx.x) / tiles.width;
  const int member = static_cast<int>(threadIdx.x) % tiles.width;
  const uint32_t begin = blockIdx.x * rows_per_block;
  const uint32_t end = std::min(rows, begin + rows_per_block);
  for (int pass = 0; pass < tiles.passes; ++pass) {
    const int64_t pack = (int64_t{blockIdx.y} * tiles.passes + pass) * tiles.width + member;
    const int64_t column = pack * kN;
    const bool used = lane < tiles.lanes && pack < packs;
    Sums<typename Op::A, Op::kColumnSums, kN> sums = {};
    if (used) {
      const auto columns = op.columns(column);
      // Where registers allow, the next row is on its way while this one is worked on.
      constexpr bool kAhead = sizeof(typename Op::Elements) + sizeof(sums) <= 64;
      uint32_t row = begin + lane;
      typename Op::Elements ahead = {};
      if (kAhead && row < end) ahead = op.load(row, column);
      for (; row < end; row += tiles.lanes) {
        const auto elements = kAhead ? ahead : op.load(row, column);
        if (kAhead && row + tiles.lanes < end) ahead = op.load(row + tiles.lanes, column);
        op.finish(columns, elements, op.row(row), row, column, sums);
      }
    }
    if constexpr (Op::kColumnSums > 0) put_column_sums(sums, tiles.lanes, tiles.width, used, column, to);
  }
}

/// For operations that need no sums over a row: every element once, and the sums of columns of each of
/// RowBlocks(rows).
template <class Op>
void launch_tiles(Context& context, const Op& op, int64_t rows, int64_t columns,
                  const Partials<typename Op::A, Op::kColumnSums>& to = {}) {
  const int64_t packs = columns / Op::kN;
  if (rows == 0 || packs == 0) return;
  const RowBlocks blocks(rows);
  constexpr int kThreads = kTileThreads<Op>;
  const Tiles tiles(blocks, packs, kThreads, kTileBlocks<Op>);
  const int64_t shared = Op::kColumnSums == 0 ? 0 : kThreads * Op::kN * int64_t{sizeof(typename Op::A)};
  launch(context,
         {.blocks = blocks.count, .threads = kThreads, .shared_bytes = shared, .blocks_y = tiles.blocks},
         tiles_kernel<Op>, op, static_cast<uint32_t>(rows), static_cast<uint32_t>(blocks.rows_per_block),
         packs, tiles, to);
}

inline constexpr int kRowSumThreads = 256;

/// terms() of every element, then put() of every row: a row a team.
template <class Op>
__global__ void __launch_bounds__(kRowSumThreads)
    row_sums_kernel(Op op, int64_t rows, int64_t packs, int team_threads) {
  Team team(team_threads);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index;
  typename Op::A sums[2] = {};
  if (row < rows) {
    const auto of_row = op.row(row);
    for (int64_t pack = team.member; pack < packs; pack += team_threads) {
      const int64_t column = pack * Op::kN;
      op.terms(op.columns(column), op.load(row, column), of_row, row, column, sums);
    }
  }
  team.sum(sums);
  if (row < rows && team.member == 0) op.put(row, sums);
}

/// For operations with sums over a row that nothing else of the row waits for.
template <class Op>
void launch_row_sums(Context& context, const Op& op, int64_t rows, int64_t columns) {
  constexpr int64_t kPacksOfThread = 4;  // so that sums over lanes do not show next to reading
  const int64_t packs = columns / Op::kN;
  const auto team_threads = static_cast<int>(std::clamp(
      round_up(ceil_div(packs, kPacksOfThread), int64_t{kWarp}), int64_t{kWarp}, int64_t{kRowSumThreads}));
  const int teams = team_threads == kWarp ? kRowSumThreads / kWarp : 1;
  launch(context, {.blocks = ceil_div(rows, int64_t{teams}), .threads = teams * team_threads},
         row_sums_kernel<Op>, op, rows, packs, team_threads);
}

/// Threads of a block whose registers hold rows, K groups of N elements on each thread.
template <class Op, int K>
inline constexpr int kHoldingThreads = K == 1 && Op::kColumnSums <= 3 ? 640 : 512;

/// Row block x, as many rows at a time as there are teams. A row's elements, K groups of N on each thread,
/// stay in registers from the sums over the row to what depends on them, and so do the sums of columns.
template <int K, class Op>
__global__ void __launch_bounds__(kHoldingThreads<Op, K>)
    whole_rows_kernel(Op op, int64_t rows, int64_t rows_per_block, int64_t packs, int team_threads,
                      Partials<typename Op::A, Op::kColumnSums> to) {
  constexpr int kN = Op::kN;
  using A = typename Op::A;
  Team team(team_threads);
  const int64_t begin = blockIdx.x * rows_per_block;
  const int64_t end = std::min(rows, begin + rows_per_block);
  const auto column = [&](int k) { return (int64_t{k} * team_threads + team.member) * kN; };
  const auto used = [&](int k) { return int64_t{k} * team_threads + team.member < packs; };

  struct Held {
    typename Op::Row of_row;
    typename Op::Elements elements[K];
  };
  const auto read = [&](int64_t row, Held& held) {
    if (row >= end) return;
    held.of_row = op.row(row);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (used(k)) held.elements[k] = op.load(row, column(k));
    }
  };

  // With one group a thread the next row is read while the sums of this one wait for other warps. With more,
  // there is as much under way, and no room for another row or for what columns need: that is read each time.
  constexpr bool kAhead = K == 1;
  typename Op::Columns columns;
  if (kAhead && used(0)) columns = op.columns(column(0));
  const auto columns_at = [&](int k) { return kAhead ? columns : op.columns(column(k)); };
  Sums<A, Op::kColumnSums, kN> sums[K] = {};
  Held held = {};
  if constexpr (kAhead) read(begin + team.index, held);
  for (int64_t first = begin; first < end; first += team.count()) {
    const int64_t row = first + team.index;
    if constexpr (!kAhead) read(row, held);
    Held next = {};
    if constexpr (kAhead) read(row + team.count(), next);
    A row_sums[2] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (row < end && used(k))
        op.terms(columns_at(k), held.elements[k], held.of_row, row, column(k), row_sums);
    }
    team.sum(row_sums);
    if (row < end) {
      if (team.member == 0) op.put(row, row_sums);
      op.take(held.of_row, row_sums);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (used(k)) op.finish(columns_at(k), held.elements[k], held.of_row, row, column(k), sums[k]);
      }
    }
    if constexpr (kAhead) held = next;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    put_column_sums(sums[k], team.count(), team_threads, used(k), column(k), to);
  }
}

/// whole_rows_kernel with the fewest groups on a thread that hold a row: from K to kMost.
template <int K, int kMost, class Op>
void launch_whole_rows(Context& context, const Op& op, int64_t rows, int64_t columns,
                       const Partials<typename Op::A, Op::kColumnSums>& to) {
  const int64_t packs = columns / Op::kN;
  if constexpr (K < kMost) {
    if (packs > K * kHoldingThreads<Op, K>)
      return launch_whole_rows<K + 1, kMost>(context, op, rows, columns, to);
  }
  const RowBlocks blocks(rows);
  const auto team_threads = static_cast<int>(round_up(ceil_div(packs, int64_t{K}), int64_t{kWarp}));
  const int64_t teams = std::min<int64_t>(kHoldingThreads<Op, K> / team_threads, blocks.rows_per_block);
  const auto threads = static_cast<int>(teams * team_threads);
  launch(context,
         {.blocks = blocks.count,
          .threads = threads,
          .shared_bytes = threads * Op::kN * int64_t{sizeof(typename Op::A)}},
         whole_rows_kernel<K, Op>, op, rows, blocks.rows_per_block, packs, team_threads, to);
}

/// For operations with sums over a row, which their results may depend on: one pass where registers hold a
/// row, that is up to kMostHeld groups of N elements on each thread; else one for the sums and one for the
/// rest. An operation whose finish() depends on the sums then finds what its put() wrote in op.row_sums
/// [rows, 2].
template <int kMostHeld, class Op>
void launch_by_rows(Context& context, Op op, int64_t rows, int64_t columns,
                    const Partials<typename Op::A, Op::kColumnSums>& to) {
  if constexpr (Op::kN > 1) {
    if (columns / Op::kN <= kMostHeld * kHoldingThreads<Op, kMostHeld>)
      return launch_whole_rows<1, kMostHeld>(context, op, rows, columns, to);
  }
  using A = typename Op::A;
  Tensor row_sums;
  if constexpr (requires { op.row_sums; }) {
    row_sums = context.empty({rows, 2}, dtype_of<A>(), MemoryUse::workspace);
    op.row_sums = row_sums.data<A>();
  }
  launch_row_sums(context, op, rows, columns);
  launch_tiles(context, op, rows, columns, to);
}

inline constexpr int kNormThreads = 512;
inline constexpr int kNormPacks = 4;  // groups of N elements of a thread

/// A row's mean and 1 / sqrt(variance + eps).
template <class A>
struct Statistics {
  A mean;
  A rstd;
};

/// Those of a row that a team holds in registers, K groups of N values on each thread, of two passes;
/// used(k): whether group k is of the row. `of_each` is 1 / columns. Every thread of the block must call.
template <int K, int N, class A, class Used>
__device__ Statistics<A> held_statistics(Team& team, const A (&values)[K][N], const Used& used, A of_each,
                                         A eps) {
  A sum[1] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!used(k)) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) sum[0] += values[k][i];
  }
  team.sum(sum);
  const A mean = sum[0] * of_each;
  A squares[1] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!used(k)) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) squares[0] += (values[k][i] - mean) * (values[k][i] - mean);
  }
  team.sum(squares);
  return {mean, rsqrt(squares[0] * of_each + eps)};
}

/// gamma * (value - mean) * rstd + beta of columns c ... c + N - 1, in place.
template <int N, class T, class A>
__device__ void normalise_values(const T* gamma, const T* beta, int64_t column, A mean, A rstd,
                                 A (&values)[N]) {
  const auto gammas = pack_at<N>(gamma, column);
  const auto betas = pack_at<N>(beta, column);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = widen(gammas.values[i]) * ((values[i] - mean) * rstd) + widen(betas.values[i]);
  }
}

/// How rows of `packs` groups of N elements lie in registers: a row a team, at most kNormPacks groups on each
/// of its threads.
struct HeldRows {
  int64_t packs;
  int64_t team_threads;

  explicit HeldRows(int64_t row_packs)
      : packs(row_packs), team_threads(round_up(ceil_div(row_packs, int64_t{kNormPacks}), int64_t{kWarp})) {}

  /// Whether a block has as many threads.
  bool fit() const { return team_threads <= kNormThreads; }

  LaunchShape launch_shape(int64_t rows) const {
    constexpr int kSmallTeams = 4;  // of a warp each, in a block
    const int64_t teams = team_threads == kWarp ? kSmallTeams : 1;
    return {.blocks = ceil_div(rows, teams), .threads = static_cast<int>(teams * team_threads)};
  }

  /// Calls body.operator()<K>() with the number of groups that a thread holds.
  template <int K = 1, class Body>
  void with_groups_of_thread(Body&& body) const {
    if constexpr (K < kNormPacks) {
      if (packs > K * team_threads) return with_groups_of_thread<K + 1>(body);
    }
    body.template operator()<K>();
  }
};

/// Rows are normalised by their mean and variance: a row a team, K groups of N elements on each thread in
/// registers. `of_each` is 1 / columns. The operation has, besides load(),
///   values(elements, c, values)                        what is normalised
///   finish(elements, values, r, c, mean, rstd)         writes the results
template <int K, class Op>
__global__ void __launch_bounds__(kNormThreads)
    norm_rows_kernel(Op op, int64_t rows, int64_t columns, int team_threads, typename Op::A of_each,
                     typename Op::A eps, typename Op::A* means, typename Op::A* rstds) {
  constexpr int kN = Op::kN;
  using A = typename Op::A;
  Team team(team_threads);
  const int64_t row = int64_t{blockIdx.x} * team.count() + team.index;
  const auto column = [&](int k) { return (int64_t{k} * team_threads + team.member) * kN; };
  const auto used = [&](int k) { return row < rows && column(k) < columns; };

  typename Op::Elements elements[K] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (used(k)) elements[k] = op.load(row, column(k));
  }
  A values[K][kN] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (used(k)) op.values(elements[k], column(k), values[k]);
  }
  const auto [mean, rstd] = held_statistics(team, values, used, of_each, eps);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (used(k)) op.finish(elements[k], values[k], row, column(k), mean, rstd);
  }
  if (row < rows && team.member == 0) {
    means[row] = mean;
    rstds[row] = rstd;
  }
}

/// The same for rows that registers do not hold: a row a block, read three times.
template <class Op>
__global__ void __launch_bounds__(kNormThreads)
    norm_wide_rows_kernel(Op op, int64_t columns, typename Op::A of_each, typename Op::A eps,
                          typename Op::A* means, typename Op::A* rstds) {
  constexpr int kN = Op::kN;
  using A = typename Op::A;
  const int64_t row = blockIdx.x;
  const int64_t first = int64_t{threadIdx.x} * kN;
  const int64_t step = int64_t{blockDim.x} * kN;
  A values[kN];
  A sum = 0;
  for (int64_t column = first; column < columns; column += step) {
    op.values(op.load(row, column), column, values);
#pragma unroll
    for (int i = 0; i < kN; ++i) sum += values[i];
  }
  const A mean = block_sum(sum) * of_each;
  A squares = 0;
  for (int64_t column = first; column < columns; column += step) {
    op.values(op.load(row, column), column, values);
#pragma unroll
    for (int i = 0; i < kN; ++i) squares += (values[i] - mean) * (values[i] - mean);
  }
  const A rstd = rsqrt(block_sum(squares) * of_each + eps);
  for (int64_t column = first; column < columns; column += step) {
    const auto elements = op.load(row, column);
    op.values(elements, column, values);
    op.finish(elements, values, row, column, mean, rstd);
  }
  if (threadIdx.x == 0) {
    means[row] = mean;
    rstds[row] = rstd;
  }
}

/// Normalises rows and writes their mean and 1 / sqrt(variance + eps), of two passes over what is normalised.
template <class Op>
void launch_norm_rows(Context& context, const Op& op, int64_t rows, int64_t columns, double eps,
                      typename Op::A* means, typename Op::A* rstds) {
  using A = typename Op::A;
  const HeldRows held(columns / Op::kN);
  const A of_one = of_each<A>(columns);
  if constexpr (Op::kN > 1) {
    if (held.fit()) {
      return held.with_groups_of_thread([&]<int K>() {
        launch(context, held.launch_shape(rows), norm_rows_kernel<K, Op>, op, rows, columns,
               static_cast<int>(held.team_threads), of_one, static_cast<A>(eps), means, rstds);
      });
    }
  }
  const int64_t threads = std::min(held.team_threads, int64_t{kNormThreads});
  launch(context, {.blocks = rows, .threads = static_cast<int>(threads)}, norm_wide_rows_kernel<Op>, op,
         columns, of_one, static_cast<A>(eps), means, rstds);
}

}  // namespace normformer::ops::cuda
