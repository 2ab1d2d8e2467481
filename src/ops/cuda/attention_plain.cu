#include <limits>

#include "ops/cuda/attention_input.h"
#include "tensor/cuda/launch.h"

// Attention with scalar arithmetic: tiles of 32 queries and 32 keys, of which each thread computes 4 rows by
// 2 columns. After Dao, Fu, Ermon, Rudra, Re, "FlashAttention", 2022, algorithms 1 and 4; gradients of
// queries are summed by a kernel of their own, which needs no sums across blocks.

namespace normformer::ops::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 32;
constexpr int kRows = 4;     // of a thread
constexpr int kColumns = 2;  // of a thread, kTile / kColumns apart
constexpr int kChunks = 4;   // of kTile channels, summed by a block; more channels are the next blocks'
constexpr int kSlice = kChunks * kTile;

template <class A>
using SharedTile = A[kTile][kTile + 1];

/// A thread's part of a tile.
template <class A>
using Part = A[kRows][kColumns];

__device__ int first_row() { return static_cast<int>(threadIdx.x) / (kTile / kColumns) * kRows; }
__device__ int column(int j) {
  return static_cast<int>(threadIdx.x) % (kTile / kColumns) + j * (kTile / kColumns);
}
__device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

/// to = kTile rows from `row`, kTile channels from `channel`; zeros beyond the matrix.
template <class T, class A>
__device__ void stage(const HeadRows<T>& rows, int row, int channel, SharedTile<A>& to) {
  const int c = channel + lane();
  for (int r = warp(); r < kTile; r += kWarps) {
    const bool there = row + r < rows.count && c < rows.size;
    to[r][lane()] = there ? widen(rows.data[(row + r) * rows.stride + c]) : A{0};
  }
}

/// The dot products of kTile rows of x with kTile rows of y. `left` and `right` are workspace.
template <class T, class A>
__device__ void multiply_rows(const HeadRows<T>& x, int x_row, const HeadRows<T>& y, int y_row,
                              SharedTile<A>& left, SharedTile<A>& right, Part<A>& products) {
  for (auto& row : products) {
    for (A& p : row) p = A{0};
  }
  for (int channel = 0; channel < x.size; channel += kTile) {
    __syncthreads();  // what was staged before has been read
    stage(x, x_row, channel, left);
    stage(y, y_row, channel, right);
    __syncthreads();
    for (int c = 0; c < kTile; ++c) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          products[i][j] += left[first_row() + i][c] * right[column(j)][c];
        }
      }
    }
  }
}

/// Sums over rows, of a slice of channels.
template <class A>
class SliceSums {
 public:
  __device__ explicit SliceSums(int first_channel) : first_channel_(first_channel) {
    for (auto& chunk : sums_) {
      for (auto& row : chunk) {
        for (A& s : row) s = A{0};
      }
    }
  }

  /// Each row times its factor.
  __device__ void scale(const A (&factors)[kTile]) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums_[chunk][i][j] *= factors[first_row() + i];
      }
    }
  }

  /// Adds weights [row][k] times rows k of x, from `row` on. `staged` is workspace.
  template <class T>
  __device__ void add(const SharedTile<A>& weights, const HeadRows<T>& x, int row, SharedTile<A>& staged) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int channel = first_channel_ + chunk * kTile;
      if (channel >= x.size) break;
      __syncthreads();  // what was staged before has been read, and weights are there
      stage(x, row, channel, staged);
      __syncthreads();
      for (int k = 0; k < kTile; ++k) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            sums_[chunk][i][j] += weights[first_row() + i][k] * staged[k][column(j)];
          }
        }
      }
    }
  }

  /// Rows below `count` times `factor` to rows from `at` on, of a head of `size` channels. Of rows that are
  /// added to, each was to be multiplied by `kept` first, where that is not null.
  template <class T>
  __device__ void give(A factor, int row, int count, int size, const ResultRows<T>& to, int64_t at,
                       const A* kept = nullptr) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int c = first_channel_ + chunk * kTile + column(j);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int r = row + first_row() + i;
          if (r >= count || c >= size) continue;
          const A value = sums_[chunk][i][j] * factor;
          if (to.added == nullptr) {
            to.written[at + r * to.stride + c] = narrow<T>(value);
          } else {
            A& sum = to.added[at + r * to.stride + c];
            sum = (kept != nullptr ? sum * kept[first_row() + i] : sum) + value;
          }
        }
      }
    }
  }

 private:
  int first_channel_;
  A sums_[kChunks][kRows][kColumns];
};

__device__ int blocks_of(int64_t rows) { return static_cast<int>(ceil_div(rows, kTile)); }

template <class Input>
using HeadOf = typename Input::HeadType;

/// Whether a query, which may be beyond the last one, attends to a key.
template <class H>
__device__ bool sees(const H& head, int query, int key) {
  if (query >= head.queries()) return false;
  const Positions keys = head.keys_of(query);
  return key >= keys.begin && key < keys.end;
}

template <class H>
__device__ typename H::A multiplier(const H& head, int query, int key) {
  typename H::A of_one[1];
  head.dropout().template multipliers_of<1>(head.dropout_sample(), head.element(query, key), of_one);
  return of_one[0];
}

template <class A>
struct ForwardShared {
  SharedTile<A> left, right, scores;
  A largest[kTile], total[kTile], factors[kTile], kept[kTile];
};

/// Of scores [query][key], which become probabilities relative to the largest score so far: what was summed
/// before is to be multiplied by `factors`. Softmax after Milakov, Gimelshein, 2018.
template <class H, class A>
__device__ void soften(const H& head, int query, int key, ForwardShared<A>& shared) {
  for (int r = warp(); r < kTile; r += kWarps) {
    const bool seen = sees(head, query + r, key + lane());
    const A score = seen ? shared.scores[r][lane()] * head.scale() : -std::numeric_limits<A>::infinity();
    const A before = shared.largest[r];
    A largest = warp_max(score);
    largest = largest < before ? before : largest;
    const A p = seen ? exp(score - largest) : A{0};
    const A sum = warp_sum(p);
    const bool drops = seen && head.drops();
    shared.scores[r][lane()] = drops ? p * multiplier(head, query + r, key + lane()) : p;
    __syncwarp();
    if (lane() == 0) {
      const A factor = before == largest ? A{1} : exp(before - largest);
      shared.factors[r] = factor;
      shared.total[r] = shared.total[r] * factor + sum;
      shared.largest[r] = largest;
    }
  }
}

/// A row's log-sum-exp; its `factors`, by which what was summed is to be multiplied; and, where `before` has
/// a row's of earlier keys, `kept`, by which the earlier result is.
template <class A>
__device__ A finish_row(const A* before, int r, ForwardShared<A>& shared) {
  const A here = shared.largest[r] + log(shared.total[r]);
  shared.factors[r] = A{1} / shared.total[r];
  if (before == nullptr) return here;
  shared.kept[r] = A{1};
  if (shared.total[r] == A{0}) {
    shared.factors[r] = A{0};
    return *before;
  }
  const A larger = *before < here ? here : *before;
  const A merged = larger + log(exp(*before - larger) + exp(here - larger));
  shared.kept[r] = exp(*before - merged);
  shared.factors[r] *= exp(here - merged);
  return merged;
}

/// `before`, null where `out` is overwritten, has earlier keys' log-sum-exps.
template <class Input, class T = typename Input::Element>
__global__ void __launch_bounds__(kThreads)
    plain_forward_kernel(Input input, ResultRows<T> out, const Accumulator<T>* before, Accumulator<T>* lse) {
  using A = Accumulator<T>;
  __shared__ ForwardShared<A> shared;
  const auto blocks = blocks_of(input.num_queries());
  const HeadOf<Input> head(input, blockIdx.x / blocks);
  const int query = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * kTile;
  for (int r = static_cast<int>(threadIdx.x); r < kTile; r += kThreads) {
    shared.largest[r] = -std::numeric_limits<A>::infinity();
    shared.total[r] = A{0};
  }
  SliceSums<A> sums(static_cast<int>(blockIdx.y) * kSlice);
  const Positions seen = head.keys_of(Positions{query, query + kTile});
  for (int key = seen.begin / kTile * kTile; key < seen.end; key += kTile) {
    Part<A> scores;
    multiply_rows(head.query_rows(), query, head.key_rows(), key, shared.left, shared.right, scores);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) shared.scores[first_row() + i][column(j)] = scores[i][j];
    }
    __syncthreads();
    soften(head, query, key, shared);
    __syncthreads();
    sums.scale(shared.factors);
    sums.add(shared.scores, head.value_rows(), key, shared.left);
  }
  __syncthreads();
  for (int r = static_cast<int>(threadIdx.x); r < kTile; r += kThreads) {
    if (query + r >= head.queries()) continue;
    const int64_t at = head.lse_at() + query + r;
    const A whole = finish_row(before == nullptr ? nullptr : before + at, r, shared);
    if (blockIdx.y == 0) lse[at] = whole;
  }
  __syncthreads();
  sums.scale(shared.factors);
  sums.give(A{1}, query, head.queries(), head.size(), out, head.query_at(out.stride), shared.kept);
}

/// What the backward finds out about a pair of query and key.
template <class A>
struct Differential {
  A probability;  ///< after dropout
  A dscore;       ///< but for the scale
};

template <class H, class T, class A>
__device__ Differential<A> differentiate(const H& head, const AttentionSaved<T>& saved, int query, int key,
                                         A score, A dprobability) {
  if (!sees(head, query, key)) return {A{0}, A{0}};
  const int64_t at = head.lse_at() + query;
  const A p = exp(score * head.scale() - saved.lse[at]);
  const A m = head.drops() ? multiplier(head, query, key) : A{1};
  return {p * m, p * (dprobability * m - saved.delta[at])};
}

template <class T, class H>
__device__ HeadRows<T> douts_of(const H& head, const AttentionSaved<T>& saved) {
  return {saved.dout + head.query_at(head.out_stride()), head.out_stride(), head.queries(), head.size()};
}

template <class Input, class T = typename Input::Element>
__global__ void __launch_bounds__(kThreads)
    plain_dq_kernel(Input input, AttentionSaved<T> saved, ResultRows<T> to) {
  using A = Accumulator<T>;
  __shared__ SharedTile<A> left, right, dscores;
  const auto blocks = blocks_of(input.num_queries());
  const HeadOf<Input> head(input, blockIdx.x / blocks);
  const int query = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * kTile;
  const HeadRows<T> douts = douts_of(head, saved);
  SliceSums<A> dq(static_cast<int>(blockIdx.y) * kSlice);
  const Positions seen = head.keys_of(Positions{query, query + kTile});
  for (int key = seen.begin / kTile * kTile; key < seen.end; key += kTile) {
    Part<A> scores, dprobabilities;
    multiply_rows(head.query_rows(), query, head.key_rows(), key, left, right, scores);
    multiply_rows(douts, query, head.value_rows(), key, left, right, dprobabilities);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        dscores[first_row() + i][column(j)] =
            differentiate(head, saved, query + first_row() + i, key + column(j), scores[i][j],
                          dprobabilities[i][j])
                .dscore;
      }
    }
    dq.add(dscores, head.key_rows(), key, left);
  }
  dq.give(head.scale(), query, head.queries(), head.size(), to, head.query_at(to.stride));
}

template <class Input, class T = typename Input::Element>
__global__ void __launch_bounds__(kThreads)
    plain_dkv_kernel(Input input, AttentionSaved<T> saved, ResultRows<T> to_dk, ResultRows<T> to_dv) {
  using A = Accumulator<T>;
  __shared__ SharedTile<A> left, right, probabilities, dscores;
  const auto blocks = blocks_of(input.num_keys());
  const HeadOf<Input> head(input, blockIdx.x / blocks);
  const int key = static_cast<int>(blockIdx.x % blocks) * kTile;
  const HeadRows<T> douts = douts_of(head, saved);
  SliceSums<A> dk(static_cast<int>(blockIdx.y) * kSlice);
  SliceSums<A> dv(static_cast<int>(blockIdx.y) * kSlice);
  for (int query = head.first_query_of(key) / kTile * kTile; query < head.queries(); query += kTile) {
    if (head.keys_of(Positions{query, query + kTile}).begin >= key + kTile) continue;
    Part<A> scores, dprobabilities;
    multiply_rows(head.key_rows(), key, head.query_rows(), query, left, right, scores);
    multiply_rows(head.value_rows(), key, douts, query, left, right, dprobabilities);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const Differential<A> d = differentiate(head, saved, query + column(j), key + first_row() + i,
                                                scores[i][j], dprobabilities[i][j]);
        probabilities[first_row() + i][column(j)] = d.probability;
        dscores[first_row() + i][column(j)] = d.dscore;
      }
    }
    dv.add(probabilities, douts, query, left);
    dk.add(dscores, head.query_rows(), query, left);
  }
  dk.give(head.scale(), key, head.keys(), head.size(), to_dk, head.key_at(to_dk.stride));
  dv.give(A{1}, key, head.keys(), head.size(), to_dv, head.key_at(to_dv.stride));
}

template <class Input>
LaunchShape shape_of(const Input& input, int64_t rows) {
  return {.blocks = input.pairs * ceil_div(rows, kTile),
          .threads = kThreads,
          .blocks_y = ceil_div(input.head_size, kSlice)};
}

}  // namespace

template <class T>
void plain_attention_forward(Context& context, const AttentionInput<T>& input, T* out, Accumulator<T>* lse) {
  const ResultRows<T> rows{out, nullptr, input.heads * input.head_size};
  launch(context, shape_of(input, input.length), plain_forward_kernel<AttentionInput<T>>, input, rows,
         nullptr, lse);
}

template <class T>
void plain_attention_backward(Context& context, const AttentionInput<T>& input,
                              const AttentionSaved<T>& saved, T* dqkv) {
  const int64_t channels = input.heads * input.head_size;
  const auto part = [&](int64_t i) { return ResultRows<T>{dqkv + i * channels, nullptr, 3 * channels}; };
  const LaunchShape shape = shape_of(input, input.length);
  launch(context, shape, plain_dq_kernel<AttentionInput<T>>, input, saved, part(0));
  launch(context, shape, plain_dkv_kernel<AttentionInput<T>>, input, saved, part(1), part(2));
}

template <class T>
void plain_partial_attention_forward(Context& context, const PartialInput<T>& input, Accumulator<T>* out,
                                     const Accumulator<T>* lse, Accumulator<T>* merged_lse) {
  const ResultRows<T> rows{nullptr, out, input.heads * input.head_size};
  launch(context, shape_of(input, input.queries.size()), plain_forward_kernel<PartialInput<T>>, input, rows,
         lse, merged_lse);
}

template <class T>
void plain_partial_attention_backward(Context& context, const PartialInput<T>& input,
                                      const AttentionSaved<T>& saved, Accumulator<T>* dq,
                                      Accumulator<T>* dkv) {
  const int64_t channels = input.heads * input.head_size;
  launch(context, shape_of(input, input.queries.size()), plain_dq_kernel<PartialInput<T>>, input, saved,
         ResultRows<T>{nullptr, dq, channels});
  launch(context, shape_of(input, input.keys.size()), plain_dkv_kernel<PartialInput<T>>, input, saved,
         ResultRows<T>{nullptr, dkv, 2 * channels}, ResultRows<T>{nullptr, dkv + channels, 2 * channels});
}

template void plain_attention_forward(Context&, const AttentionInput<double>&, double*, double*);
template void plain_attention_forward(Context&, const AttentionInput<float>&, float*, float*);
template void plain_attention_forward(Context&, const AttentionInput<bf16>&, bf16*, float*);
template void plain_attention_forward(Context&, const AttentionInput<f16>&, f16*, float*);
template void plain_attention_backward(Context&, const AttentionInput<double>&, const AttentionSaved<double>&,
                                       double*);
template void plain_attention_backward(Context&, const AttentionInput<float>&, const AttentionSaved<float>&,
                                       float*);
template void plain_attention_backward(Context&, const AttentionInput<bf16>&, const AttentionSaved<bf16>&,
                                       bf16*);
template void plain_attention_backward(Context&, const AttentionInput<f16>&, const AttentionSaved<f16>&,
                                       f16*);
template void plain_partial_attention_forward(Context&, const PartialInput<double>&, double*, const double*,
                                              double*);
template void plain_partial_attention_forward(Context&, const PartialInput<float>&, float*, const float*,
                                              float*);
template void plain_partial_attention_forward(Context&, const PartialInput<bf16>&, float*, const float*,
                                              float*);
template void plain_partial_attention_forward(Context&, const PartialInput<f16>&, float*, const float*,
                                              float*);
template void plain_partial_attention_backward(Context&, const PartialInput<double>&,
                                               const AttentionSaved<double>&, double*, double*);
template void plain_partial_attention_backward(Context&, const PartialInput<float>&,
                                               const AttentionSaved<float>&, float*, float*);
template void plain_partial_attention_backward(Context&, const PartialInput<bf16>&,
                                               const AttentionSaved<bf16>&, float*, float*);
template void plain_partial_attention_backward(Context&, const PartialInput<f16>&, const AttentionSaved<f16>&,
                                               float*, float*);

}  // namespace normformer::ops::cuda
