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

/// Rows of a matrix, of one head's channels.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int count;
  int size;
};

/// to = kTile rows from `row`, kTile channels from `channel`; zeros beyond the matrix.
template <class T, class A>
__device__ void stage(const Rows<T>& rows, int row, int channel, SharedTile<A>& to) {
  const int c = channel + lane();
  for (int r = warp(); r < kTile; r += kWarps) {
    const bool there = row + r < rows.count && c < rows.size;
    to[r][lane()] = there ? widen(rows.data[(row + r) * rows.stride + c]) : A{0};
  }
}

/// The dot products of kTile rows of x with kTile rows of y. `left` and `right` are workspace.
template <class T, class A>
__device__ void multiply_rows(const Rows<T>& x, int x_row, const Rows<T>& y, int y_row, SharedTile<A>& left,
                              SharedTile<A>& right, Part<A>& products) {
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
  __device__ void add(const SharedTile<A>& weights, const Rows<T>& x, int row, SharedTile<A>& staged) {
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

  /// Rows below `count` times `factor` to rows of a head of `size` channels.
  template <class T>
  __device__ void write(A factor, int row, int count, int size, T* to, int64_t stride) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int c = first_channel_ + chunk * kTile + column(j);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int r = row + first_row() + i;
          if (r < count && c < size) to[r * stride + c] = narrow<T>(sums_[chunk][i][j] * factor);
        }
      }
    }
  }

 private:
  int first_channel_;
  A sums_[kChunks][kRows][kColumns];
};

template <class T>
__device__ Rows<T> rows_of(const Head<T>& head, int part) {
  return {head.rows(part), head.qkv_stride(), head.length(), head.size()};
}

/// Whether a query, which may be beyond the last one, attends to a key.
template <class T>
__device__ bool sees(const Head<T>& head, int query, int key) {
  if (query >= head.length()) return false;
  const Positions keys = head.keys_of(query);
  return key >= keys.begin && key < keys.end;
}

template <class T>
__device__ Accumulator<T> multiplier(const Head<T>& head, int query, int key) {
  Accumulator<T> of_one[1];
  head.dropout().template multipliers_of<1>(head.dropout_sample(), head.element(query, key), of_one);
  return of_one[0];
}

template <class A>
struct ForwardShared {
  SharedTile<A> left, right, scores;
  A largest[kTile], total[kTile], factors[kTile];
};

/// Of scores [query][key], which become probabilities relative to the largest score so far: what was summed
/// before is to be multiplied by `factors`. Softmax after Milakov, Gimelshein, 2018.
template <class T, class A>
__device__ void soften(const Head<T>& head, int query, int key, ForwardShared<A>& shared) {
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

template <class T>
__global__ void __launch_bounds__(kThreads)
    plain_forward_kernel(AttentionInput<T> input, T* out, Accumulator<T>* lse) {
  using A = Accumulator<T>;
  __shared__ ForwardShared<A> shared;
  const auto blocks = static_cast<int>(ceil_div(input.length, kTile));
  const Head<T> head(input, blockIdx.x / blocks);
  const int query = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * kTile;
  for (int r = static_cast<int>(threadIdx.x); r < kTile; r += kThreads) {
    shared.largest[r] = -std::numeric_limits<A>::infinity();
    shared.total[r] = A{0};
  }
  SliceSums<A> sums(static_cast<int>(blockIdx.y) * kSlice);
  const Positions seen = head.keys_of(Positions{query, query + kTile});
  for (int key = seen.begin / kTile * kTile; key < seen.end; key += kTile) {
    Part<A> scores;
    multiply_rows(rows_of(head, 0), query, rows_of(head, 1), key, shared.left, shared.right, scores);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) shared.scores[first_row() + i][column(j)] = scores[i][j];
    }
    __syncthreads();
    soften(head, query, key, shared);
    __syncthreads();
    sums.scale(shared.factors);
    sums.add(shared.scores, rows_of(head, 2), key, shared.left);
  }
  __syncthreads();
  for (int r = static_cast<int>(threadIdx.x); r < kTile; r += kThreads) {
    if (blockIdx.y == 0 && query + r < head.length()) {
      lse[head.lse_at() + query + r] = shared.largest[r] + log(shared.total[r]);
    }
    shared.factors[r] = A{1} / shared.total[r];
  }
  __syncthreads();
  sums.scale(shared.factors);
  sums.write(A{1}, query, head.length(), head.size(), out + head.out_at(), head.out_stride());
}

/// What the backward finds out about a pair of query and key.
template <class A>
struct Differential {
  A probability;  ///< after dropout
  A dscore;       ///< but for the scale
};

template <class T, class A>
__device__ Differential<A> differentiate(const Head<T>& head, const AttentionSaved<T>& saved, int query,
                                         int key, A score, A dprobability) {
  if (!sees(head, query, key)) return {A{0}, A{0}};
  const int64_t at = head.lse_at() + query;
  const A p = exp(score * head.scale() - saved.lse[at]);
  const A m = head.drops() ? multiplier(head, query, key) : A{1};
  return {p * m, p * (dprobability * m - saved.delta[at])};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    plain_dq_kernel(AttentionInput<T> input, AttentionSaved<T> saved, T* dqkv) {
  using A = Accumulator<T>;
  __shared__ SharedTile<A> left, right, dscores;
  const auto blocks = static_cast<int>(ceil_div(input.length, kTile));
  const Head<T> head(input, blockIdx.x / blocks);
  const int query = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * kTile;
  const Rows<T> douts{saved.dout + head.out_at(), head.out_stride(), head.length(), head.size()};
  SliceSums<A> dq(static_cast<int>(blockIdx.y) * kSlice);
  const Positions seen = head.keys_of(Positions{query, query + kTile});
  for (int key = seen.begin / kTile * kTile; key < seen.end; key += kTile) {
    Part<A> scores, dprobabilities;
    multiply_rows(rows_of(head, 0), query, rows_of(head, 1), key, left, right, scores);
    multiply_rows(douts, query, rows_of(head, 2), key, left, right, dprobabilities);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        dscores[first_row() + i][column(j)] =
            differentiate(head, saved, query + first_row() + i, key + column(j), scores[i][j],
                          dprobabilities[i][j])
                .dscore;
      }
    }
    dq.add(dscores, rows_of(head, 1), key, left);
  }
  dq.write(head.scale(), query, head.length(), head.size(), dqkv + head.qkv_at(0), head.qkv_stride());
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    plain_dkv_kernel(AttentionInput<T> input, AttentionSaved<T> saved, T* dqkv) {
  using A = Accumulator<T>;
  __shared__ SharedTile<A> left, right, probabilities, dscores;
  const auto blocks = static_cast<int>(ceil_div(input.length, kTile));
  const Head<T> head(input, blockIdx.x / blocks);
  const int key = static_cast<int>(blockIdx.x % blocks) * kTile;
  const Rows<T> douts{saved.dout + head.out_at(), head.out_stride(), head.length(), head.size()};
  SliceSums<A> dk(static_cast<int>(blockIdx.y) * kSlice);
  SliceSums<A> dv(static_cast<int>(blockIdx.y) * kSlice);
  for (int query = head.causal() ? key : 0; query < head.length(); query += kTile) {
    if (head.keys_of(Positions{query, query + kTile}).begin >= key + kTile) continue;
    Part<A> scores, dprobabilities;
    multiply_rows(rows_of(head, 1), key, rows_of(head, 0), query, left, right, scores);
    multiply_rows(rows_of(head, 2), key, douts, query, left, right, dprobabilities);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const Differential<A> d = differentiate(head, saved, query + column(j), key + first_row() + i,
                                                scores[i][j], dprobabilities[i][j]);
        probabilities[first_row() + i][column(j)] = d.probability;
        dscores[first_row() + i][column(j)] = d.dscore;
      }
    }
    dv.add(probabilities, douts, query, left);
    dk.add(dscores, rows_of(head, 0), query, left);
  }
  dk.write(head.scale(), key, head.length(), head.size(), dqkv + head.qkv_at(1), head.qkv_stride());
  dv.write(A{1}, key, head.length(), head.size(), dqkv + head.qkv_at(2), head.qkv_stride());
}

template <class T>
LaunchShape shape_of(const AttentionInput<T>& input) {
  return {.blocks = input.pairs * ceil_div(input.length, kTile),
          .threads = kThreads,
          .blocks_y = ceil_div(input.head_size, kSlice)};
}

}  // namespace

template <class T>
void plain_attention_forward(Context& context, const AttentionInput<T>& input, T* out, Accumulator<T>* lse) {
  launch(context, shape_of(input), plain_forward_kernel<T>, input, out, lse);
}

template <class T>
void plain_attention_backward(Context& context, const AttentionInput<T>& input,
                              const AttentionSaved<T>& saved, T* dqkv) {
  launch(context, shape_of(input), plain_dq_kernel<T>, input, saved, dqkv);
  launch(context, shape_of(input), plain_dkv_kernel<T>, input, saved, dqkv);
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

}  // namespace normformer::ops::cuda
